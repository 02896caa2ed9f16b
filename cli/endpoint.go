package cli

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"github.com/spf13/cobra"
)

func endpointCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{Use: "endpoint", Short: "Show and limit the containers that are attached to this host"}
	c.PersistentFlags().StringVar(&dir, "dir", endpoint.DefaultDir, "endpointDir of silk-cni")
	c.AddCommand(endpointList(&dir), endpointLimit(&dir))
	return c
}

// openEndpoints opens a directory of endpoints that is there.
func openEndpoints(dir string) (*endpoint.Dir, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("no container was attached to this host since it started, or --dir is wrong: %w", err)
	}
	return endpoint.Open(dir)
}

func endpointList(dir *string) *cobra.Command {
	var form string
	c := &cobra.Command{Use: "list", Short: "List the containers with their addresses, port maps and limits", Args: cobra.NoArgs}
	c.Flags().StringVarP(&form, "output", "o", tables, "table or json")
	c.RunE = func(c *cobra.Command, _ []string) error {
		d, err := openEndpoints(*dir)
		if err != nil {
			return err
		}
		records, bad, err := d.List()
		if err != nil {
			return err
		}
		for _, b := range bad {
			fmt.Fprintf(c.ErrOrStderr(), "silk: %s cannot be read: %v\n", b.File, b.Err)
		}
		switch form {
		case jsonForm:
			return json.NewEncoder(c.OutOrStdout()).Encode(records)
		case tables:
			return writeEndpoints(c, records)
		}
		return fault.Invalidf("output %q: expected table or json", form)
	}
	return c
}

func writeEndpoints(c *cobra.Command, records []endpoint.Record) error {
	t := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CONTAINER\tINTERFACE\tNETWORK\tADDRESS\tGROUP\tPORTS\tTO IT\tFROM IT")
	for _, r := range records {
		var ports []string
		for _, m := range r.PortMaps {
			host := strconv.Itoa(int(m.HostPort))
			if m.HostIP.IsValid() {
				host = m.HostIP.String() + ":" + host
			}
			ports = append(ports, fmt.Sprintf("%s>%d/%s", host, m.ContainerPort, m.Protocol))
		}
		var l endpoint.Limits
		if r.Limits != nil {
			l = *r.Limits
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%v\t%s\t%s\t%s\t%s\n", r.Container, r.Interface, r.Network, r.Address(), r.Group,
			strings.Join(nonEmpty(strings.Join(ports, ","), "-")[:1], ""), rateText(l.IngressRate), rateText(l.EgressRate))
	}
	return t.Flush()
}

// rateText words a limit.
func rateText(bits uint64) string {
	if bits == 0 {
		return "-"
	}
	for _, u := range units[1:] {
		if bits%u.factor == 0 {
			return fmt.Sprintf("%d%s", bits/u.factor, u.name)
		}
	}
	return fmt.Sprint(bits)
}

// units are those of rates and bursts, decimal as networks have them.
var units = []struct {
	name   string
	factor uint64
}{{"", 1}, {"G", 1e9}, {"M", 1e6}, {"k", 1e3}}

// parseBits reads "8000000", "8M" or "1.5G": bits, or bits a second.
func parseBits(text string) (uint64, error) {
	number, factor := text, uint64(1)
	for _, u := range units[1:] {
		if rest, ok := strings.CutSuffix(strings.ToUpper(text), strings.ToUpper(u.name)); ok {
			number, factor = rest, u.factor
		}
	}
	v, err := strconv.ParseFloat(number, 64)
	if err != nil || v < 0 || v*float64(factor) > 1<<53 || strings.ContainsAny(number, "xXpPeEiInN_") {
		return 0, fault.Invalidf("%q: expected bits such as 8000000, 500k, 100M or 1.5G", text)
	}
	return uint64(v * float64(factor)), nil
}

func endpointLimit(dir *string) *cobra.Command {
	var network, device string
	c := &cobra.Command{
		Use: "limit CONTAINER", Short: "Change the limits of a container that is attached", Args: cobra.ExactArgs(1),
		Long: "Ingress is what goes to the container, egress what comes from it. A limit that is not named stays as it is; a rate of 0 takes it away.\n" +
			"A rate without a burst gets a burst of what 10 ms of it bring. The limits hold until the container is detached.",
		Example: "  silk endpoint limit 3f2a --ingress-rate 100M --egress-rate 50M --egress-burst 2M",
	}
	values := map[string]*string{}
	for _, name := range []string{"ingress-rate", "ingress-burst", "egress-rate", "egress-burst"} {
		what := "bits a second"
		if strings.HasSuffix(name, "burst") {
			what = "bits"
		}
		values[name] = c.Flags().String(name, "", what+", with k, M or G")
	}
	c.Flags().StringVar(&network, "network", "", "name of the network, if the container has several")
	c.Flags().StringVar(&device, "interface", "", "name of the interface in the container, if it has several")
	c.RunE = func(c *cobra.Command, args []string) error {
		d, err := openEndpoints(*dir)
		if err != nil {
			return err
		}
		k, err := findEndpoint(d, args[0], network, device)
		if err != nil {
			return err
		}
		change, err := limitsFrom(values)
		if err != nil {
			return err
		}
		r, err := d.SetLimits(c.Context(), k, change)
		if err != nil {
			return err
		}
		return writeEndpoints(c, []endpoint.Record{r})
	}
	return c
}

// findEndpoint returns the only endpoint that is meant.
func findEndpoint(d *endpoint.Dir, container, network, device string) (endpoint.Key, error) {
	records, _, err := d.List()
	if err != nil {
		return endpoint.Key{}, err
	}
	records = slices.DeleteFunc(records, func(r endpoint.Record) bool {
		return r.Container != container || network != "" && r.Network != network || device != "" && r.Interface != device
	})
	switch len(records) {
	case 0:
		return endpoint.Key{}, fault.NotFoundf("no container %s is attached to this host: see silk endpoint list", container)
	case 1:
		return records[0].Key, nil
	}
	var which []string
	for _, r := range records {
		which = append(which, r.Key.String())
	}
	return endpoint.Key{}, fault.Invalidf("container %s has %s: say which by --network and --interface", container, strings.Join(which, " and "))
}

// limitsFrom returns what the flags do to the limits that an endpoint has.
func limitsFrom(values map[string]*string) (func(endpoint.Record) (endpoint.Limits, error), error) {
	given := map[string]uint64{}
	for name, text := range values {
		if *text == "" {
			continue
		}
		v, err := parseBits(*text)
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", name, err)
		}
		given[name] = v
	}
	if len(given) == 0 {
		return nil, fault.Invalidf("no limit is named: expected --ingress-rate or --egress-rate")
	}
	return func(r endpoint.Record) (endpoint.Limits, error) {
		var l endpoint.Limits
		if r.Limits != nil {
			l = *r.Limits
		}
		for _, way := range []struct {
			name        string
			rate, burst *uint64
		}{{"ingress", &l.IngressRate, &l.IngressBurst}, {"egress", &l.EgressRate, &l.EgressBurst}} {
			rate, hasRate := given[way.name+"-rate"]
			burst, hasBurst := given[way.name+"-burst"]
			if hasRate {
				*way.rate = rate
				*way.burst = max(endpoint.SmallestBurst(rate, r.MTU), rate/100)
			}
			if hasBurst {
				*way.burst = burst
			} else if *way.rate == 0 {
				*way.burst = 0
			}
		}
		return l, nil
	}, nil
}
