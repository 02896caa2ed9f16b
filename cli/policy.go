package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"github.com/spf13/cobra"
)

// The forms of output.
const (
	tables   = "table"
	jsonForm = "json"
)

func policyCommand() *cobra.Command {
	f := &policyFlags{}
	c := &cobra.Command{
		Use: "policy", Short: "Say which application may talk to which",
		Long: "Containers are closed to each other until a policy lets the one group (in Cloud Foundry an app) open connections to the other.\n" +
			"Which policy-server is asked, and as whom, is told by the flags or by the environment:\n" +
			"SILK_POLICY_SERVER, SILK_POLICY_TOKEN, SILK_POLICY_CA, SILK_POLICY_CERT, SILK_POLICY_KEY.",
	}
	f.add(c)
	c.AddCommand(
		policyChange(f, "add", "Let a source open connections to a destination", "added", (*policyhttp.Client).Create, (*policyhttp.Client).CreateInForce),
		policyChange(f, "remove", "Take back what a policy allows", "removed", (*policyhttp.Client).Delete, (*policyhttp.Client).DeleteInForce),
		policyList(f),
	)
	return c
}

// policyWords is the form of a policy in JSON, as the API has it.
type policyWords struct {
	Source      identity.Group  `json:"source"`
	Destination identity.Group  `json:"destination"`
	Protocol    policy.Protocol `json:"protocol"`
	Ports       string          `json:"ports"`
}

func wordsOf(ps []policy.Policy) []policyWords {
	out := make([]policyWords, len(ps))
	for i, p := range ps {
		out[i] = policyWords{p.Source, p.Destination, p.Protocol, p.Ports.String()}
	}
	return out
}

// change is what an add or remove prints as JSON.
type change struct {
	Policies []policyWords `json:"policies"`
	Force    *force        `json:"force,omitempty"` // with --wait
}

// force tells how far a change has come.
type force struct {
	InForce   bool     `json:"in_force"`
	Known     int      `json:"hosts_known"`
	Reporting int      `json:"hosts_reporting"`
	Unknown   int      `json:"hosts_unknown"`
	Lagging   []string `json:"hosts_lagging"` // by name, perhaps not all
	Behind    int      `json:"hosts_behind"`  // how many lag
	OldAgents bool     `json:"old_agents"`
	Took      float64  `json:"seconds"`
}

type (
	simply  func(*policyhttp.Client, context.Context, []policy.Policy) error
	waiting func(*policyhttp.Client, context.Context, []policy.Policy, time.Duration) (policyhttp.Force, error)
)

// policyChange returns add or remove.
func policyChange(f *policyFlags, use, short, done string, now simply, inForce waiting) *cobra.Command {
	var protocol, ports, form string
	var wait bool
	var timeout time.Duration
	c := &cobra.Command{Use: use + " SOURCE DESTINATION", Short: short, Args: cobra.ExactArgs(2)}
	c.Long = short + "\n\nSOURCE and DESTINATION are policy groups: names of apps, where Cloud Controller is behind the server, their GUIDs, or whatever\n" +
		"the containers were started with. With --wait the exit status is 0 when the change is in force on every host that reports,\n" +
		"and 2 when it is made but some host lags or cannot tell."
	c.Flags().StringVar(&protocol, "protocol", "tcp", "tcp or udp")
	c.Flags().StringVar(&ports, "ports", "8080", "a port such as 8080, a range such as 8000-8100, or several separated by commas")
	c.Flags().BoolVar(&wait, "wait", false, "wait until the change is in force on the hosts")
	c.Flags().DurationVar(&timeout, "timeout", 30*time.Second, "for how long to wait")
	c.Flags().StringVarP(&form, "output", "o", tables, "table or json")
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := checkForm(form); err != nil {
			return err
		}
		client, err := f.client()
		if err != nil {
			return err
		}
		defer client.Close()
		groups, err := f.resolve(c.Context(), args)
		if err != nil {
			return err
		}
		ps, err := policiesOf(groups[0], groups[1], protocol, ports)
		if err != nil {
			return err
		}
		if !wait {
			if err := now(client, c.Context(), ps); err != nil {
				return f.advise(err)
			}
			return tellChange(c.OutOrStdout(), form, done, ps, nil)
		}
		begun := time.Now()
		got, err := inForce(client, c.Context(), ps, timeout)
		if err != nil {
			return f.advise(err)
		}
		report := &force{got.InForce, got.Known, got.Reporting, got.Unknown, got.Lagging, got.Behind, got.OldAgents, time.Since(begun).Seconds()}
		if err := tellChange(c.OutOrStdout(), form, done, ps, report); err != nil {
			return err
		}
		if !got.InForce {
			return exitCode(2)
		}
		return nil
	}
	return c
}

func checkForm(form string) error {
	if form != tables && form != jsonForm {
		return fault.Invalidf("output %q: expected %s or %s", form, tables, jsonForm)
	}
	return nil
}

// policiesOf returns the policies that a command line names, one for each range of ports.
func policiesOf(source, destination identity.Group, protocol, ports string) ([]policy.Policy, error) {
	proto, err := policy.ParseProtocol(protocol)
	if err != nil {
		return nil, fmt.Errorf("--protocol: %w", err)
	}
	var out []policy.Policy
	for s := range strings.SplitSeq(ports, ",") {
		r, err := policy.ParsePorts(strings.TrimSpace(s))
		if err != nil {
			return nil, fmt.Errorf("--ports: %w", err)
		}
		p := policy.Policy{Source: source, Destination: destination, Protocol: proto, Ports: r}
		if err := p.Validate(); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func tellChange(w io.Writer, form, done string, ps []policy.Policy, f *force) error {
	if form == jsonForm {
		return writeJSON(w, change{wordsOf(ps), f})
	}
	for _, p := range ps {
		fmt.Fprintf(w, "%s %v\n", done, p)
	}
	if f == nil {
		return nil
	}
	_, err := io.WriteString(w, f.text())
	return err
}

// text says how far a change has come, and who lags.
func (f *force) text() string {
	var b strings.Builder
	if f.InForce {
		fmt.Fprintf(&b, "in force on %s after %.0f ms\n", hosts(f.Reporting), f.Took*1000)
	} else {
		fmt.Fprintf(&b, "not in force everywhere after %.1f s: %d of %s that report have it\n", f.Took, max(f.Reporting-f.Behind, 0), hosts(f.Reporting))
	}
	for _, h := range f.Lagging {
		fmt.Fprintf(&b, "  %s lags: see /health of its vxlan-policy-agent\n", h)
	}
	if more := f.Behind - len(f.Lagging); more > 0 {
		fmt.Fprintf(&b, "  %s more lag\n", hosts(more))
	}
	if f.Unknown > 0 {
		fmt.Fprintf(&b, "  %s reported earlier and do not any more: nothing is known of them\n", hosts(f.Unknown))
	}
	if f.OldAgents {
		b.WriteString("  agents of an earlier kind poll this server: they follow within their poll interval and cannot say when\n")
	}
	return b.String()
}

func hosts(n int) string {
	if n == 1 {
		return "1 host"
	}
	return fmt.Sprintf("%d hosts", n)
}

func policyList(f *policyFlags) *cobra.Command {
	var sources, destinations, either []string
	var form string
	c := &cobra.Command{Use: "list", Short: "List the policies that you may see", Args: cobra.NoArgs}
	c.Flags().StringSliceVar(&sources, "source", nil, "only those from this group; may be given several times")
	c.Flags().StringSliceVar(&destinations, "destination", nil, "only those to this group, likewise")
	c.Flags().StringSliceVar(&either, "group", nil, "only those from or to this group, likewise; the other two then count for nothing")
	c.Flags().StringVarP(&form, "output", "o", tables, "table or json")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := checkForm(form); err != nil {
			return err
		}
		client, err := f.client()
		if err != nil {
			return err
		}
		defer client.Close()
		var filter policy.Filter
		for _, l := range []struct {
			names []string
			to    *[]identity.Group
		}{{sources, &filter.Sources}, {destinations, &filter.Destinations}, {either, &filter.Either}} {
			if l.names == nil {
				continue
			}
			if *l.to, err = f.resolve(c.Context(), l.names); err != nil {
				return err
			}
		}
		ps, err := client.List(c.Context(), filter)
		var partial *policyhttp.Partial
		if err != nil && !errors.As(err, &partial) {
			return f.advise(err)
		}
		if form == jsonForm {
			return errors.Join(writeJSON(c.OutOrStdout(), change{Policies: wordsOf(ps)}), err)
		}
		t := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "SOURCE\tDESTINATION\tPROTOCOL\tPORTS")
		for _, p := range ps {
			fmt.Fprintf(t, "%s\t%s\t%v\t%v\n", p.Source, p.Destination, p.Protocol, p.Ports)
		}
		return errors.Join(t.Flush(), err)
	}
	return c
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
