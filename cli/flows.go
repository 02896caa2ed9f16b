package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"github.com/spf13/cobra"
)

// flowsFlags say which records of which agent are asked for.
type flowsFlags struct {
	follow, denied, ended bool
	group, since, output  string
	port                  int
}

func flowsCommand() *cobra.Command {
	var f flowsFlags
	c := &cobra.Command{Use: "flows", Short: "Show the connections of this host's containers: who, to whom, whether and why", Args: cobra.NoArgs}
	c.PersistentFlags().IntVar(&f.port, "port", 8721, "debug_server_port of the host's vxlan-policy-agent")
	c.Flags().BoolVarP(&f.follow, "follow", "f", false, "go on with those that come")
	c.Flags().BoolVar(&f.denied, "denied", false, "only those that were refused")
	c.Flags().BoolVar(&f.ended, "ended", false, "one line for a connection: when it was refused or has ended, not when it begins")
	c.Flags().StringVar(&f.group, "group", "", "only those from or to this policy group")
	c.Flags().StringVar(&f.since, "since", "", "only later ones: an age such as 10m, or a time such as 2026-01-02T15:04:05Z (default all that are kept, with -f those that come)")
	c.Flags().StringVarP(&f.output, "output", "o", "table", "table or json: one object a line")
	c.Long = c.Short + `

The agent keeps its last 4,096 records while the flow log is on ("silk flows log on"). A connection that was let through has two: "begun" with its
first packet, and "ended" when the kernel has forgotten it, some two minutes after its last.`
	c.RunE = func(c *cobra.Command, _ []string) error { return f.run(c) }
	c.AddCommand(f.logCommand())
	return c
}

func (f *flowsFlags) base() string { return fmt.Sprintf("http://127.0.0.1:%d", f.port) }

// flowSwitch is the agent's switch of the flow log.
type flowSwitch struct {
	C2C    *bool `json:"c2c,omitempty"`
	Egress *bool `json:"egress,omitempty"`
}

func (s flowSwitch) String() string {
	word := func(on *bool) string {
		if on != nil && *on {
			return "on"
		}
		return "off"
	}
	return fmt.Sprintf("between containers %s, to the outside %s", word(s.C2C), word(s.Egress))
}

// turn asks for the switch, and sets it if anything is given.
func (f *flowsFlags) turn(ctx context.Context, s flowSwitch) (flowSwitch, error) {
	api := httpjson.Client{Base: f.base(), HTTP: &http.Client{Timeout: 5 * time.Second}, Limit: 1 << 16}
	method, in := http.MethodGet, any(nil)
	if s != (flowSwitch{}) {
		method, in = http.MethodPut, s
	}
	var now flowSwitch
	if err := api.Do(ctx, method, "/flow-log", in, &now); err != nil {
		return now, f.unreached(err)
	}
	return now, nil
}

func (f *flowsFlags) unreached(err error) error {
	return fmt.Errorf("ask vxlan-policy-agent on this host: %w: is it running, and is %d its debug_server_port?", err, f.port)
}

func (f *flowsFlags) logCommand() *cobra.Command {
	var only string
	c := &cobra.Command{Use: "log [on|off]", Short: "Show the switch of the flow log, or turn it until the agent restarts", Args: cobra.MaximumNArgs(1)}
	c.Flags().StringVar(&only, "only", "", "c2c or egress: turn only what is between containers, or what goes to the outside")
	c.RunE = func(c *cobra.Command, args []string) error {
		var s flowSwitch
		if len(args) > 0 {
			on := args[0] == "on"
			if !on && args[0] != "off" {
				return fault.Invalidf("%q: expected on or off", args[0])
			}
			switch only {
			case "":
				s = flowSwitch{&on, &on}
			case "c2c":
				s.C2C = &on
			case "egress":
				s.Egress = &on
			default:
				return fault.Invalidf("--only %q: expected c2c or egress", only)
			}
		}
		now, err := f.turn(c.Context(), s)
		if err != nil {
			return err
		}
		fmt.Fprintln(c.OutOrStdout(), now)
		return nil
	}
	return c
}

// query returns what is asked of the agent.
func (f *flowsFlags) query(now time.Time) (url.Values, error) {
	q := url.Values{}
	for name, on := range map[string]bool{"follow": f.follow, "denied": f.denied, "ended": f.ended} {
		if on {
			q.Set(name, "true")
		}
	}
	if f.group != "" {
		q.Set("group", f.group)
	}
	since := f.since
	if age, err := time.ParseDuration(since); err == nil {
		since = now.Add(-age).UTC().Format(time.RFC3339Nano)
	} else if since == "" && f.follow {
		since = now.UTC().Format(time.RFC3339Nano)
	}
	if since != "" {
		if _, err := time.Parse(time.RFC3339Nano, since); err != nil {
			return nil, fault.Invalidf("--since %q: expected an age such as 10m, or a time such as 2026-01-02T15:04:05Z", f.since)
		}
		q.Set("since", since)
	}
	return q, nil
}

func (f *flowsFlags) run(c *cobra.Command) error {
	show, ok := map[string]func(io.Writer, []byte) error{"table": tableFlow, "json": jsonFlow}[f.output]
	if !ok {
		return fault.Invalidf("--output %q: expected table or json", f.output)
	}
	q, err := f.query(time.Now())
	if err != nil {
		return err
	}
	now, err := f.turn(c.Context(), flowSwitch{})
	if err != nil {
		return err
	}
	if !*orFalse(now.C2C) && !*orFalse(now.Egress) {
		fmt.Fprintln(c.ErrOrStderr(), "The flow log is off on this host: nothing new is recorded. Turn it on with \"silk flows log on\".")
	}
	if f.output == "table" {
		fmt.Fprintf(c.OutOrStdout(), flowColumns, "TIME", "EVENT", "PROTO", "FROM", "TO", "REASON")
	}
	for failures := 0; ; {
		shown, err := f.stream(c, q, show)
		if c.Context().Err() != nil || errors.Is(err, errOutput) {
			return nil // interrupted, or nobody reads any more
		}
		if !f.follow || fault.Of(err) == fault.Invalid {
			return err
		}
		// The agent was restarted, or found us too slow: go on where we were.
		if failures++; shown > 0 {
			failures = 1
		}
		pause := time.NewTimer(reconcile.Backoff(100*time.Millisecond, 2*time.Second, failures))
		select {
		case <-c.Context().Done():
			pause.Stop()
			return nil
		case <-pause.C:
		}
	}
}

func orFalse(b *bool) *bool {
	if b == nil {
		b = new(bool)
	}
	return b
}

// errOutput is a failure of our own output: a pipe that nobody reads.
var errOutput = errors.New("write output")

// maxFlowLine bounds a record's line in bytes.
const maxFlowLine = 1 << 16

// stream shows the records of one answer, and notes in q where the next one goes on.
func (f *flowsFlags) stream(c *cobra.Command, q url.Values, show func(io.Writer, []byte) error) (shown int, err error) {
	req, err := http.NewRequestWithContext(c.Context(), http.MethodGet, f.base()+"/flows?"+q.Encode(), nil)
	if err != nil {
		return 0, err
	}
	client := http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{Timeout: 5 * time.Second}).DialContext, ResponseHeaderTimeout: 10 * time.Second}}
	defer client.CloseIdleConnections()
	resp, err := client.Do(req)
	if err != nil {
		return 0, f.unreached(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		err := fmt.Errorf("vxlan-policy-agent: http status %d: %s", resp.StatusCode, printable(strings.TrimSpace(string(b))))
		if resp.StatusCode == http.StatusBadRequest || resp.StatusCode == http.StatusNotFound {
			return 0, fault.New(fault.Invalid, err)
		}
		return 0, err
	}
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxFlowLine)
	for lines.Scan() {
		var x struct {
			ID      string `json:"id"`
			Event   string `json:"event"`
			Records uint64 `json:"records"`
		}
		if err := json.Unmarshal(lines.Bytes(), &x); err != nil {
			return shown, fmt.Errorf("read a record of vxlan-policy-agent: %w", err)
		}
		if x.Event == "missed" {
			fmt.Fprintf(c.ErrOrStderr(), "%d records were missed: more came than could be shown\n", x.Records)
			continue
		}
		if err := show(c.OutOrStdout(), lines.Bytes()); err != nil {
			return shown, errors.Join(errOutput, err)
		}
		if shown++; x.ID != "" {
			q.Set("after", x.ID)
		}
	}
	return shown, lines.Err()
}

func jsonFlow(w io.Writer, line []byte) error {
	_, err := fmt.Fprintf(w, "%s\n", line)
	return err
}

const flowColumns = "%-15s  %-8s  %-5s  %-32s  %-32s  %s\n"

// flowEnd is one end of a connection.
type flowEnd struct {
	Group     string `json:"group"`
	Container string `json:"container_id"`
	Tag       string `json:"tag"`
}

// name returns a group, else an address, with a port unless it is 0.
func (e flowEnd) name(ip string, port uint16) string {
	name := ip
	if e.Group != "" {
		name = e.Group + " " + ip
	}
	if port != 0 {
		name += ":" + strconv.Itoa(int(port))
	}
	return printable(name)
}

// printable keeps what comes from containers from steering a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// tableFlow shows a record as a line of a table.
func tableFlow(w io.Writer, line []byte) error {
	var x struct {
		Time   time.Time `json:"time"`
		Event  string    `json:"event"`
		Reason string    `json:"reason"`
		Packet struct {
			Source   string `json:"src_ip"`
			To       string `json:"dst_ip"`
			FromPort uint16 `json:"src_port"`
			Port     uint16 `json:"dst_port"`
			Protocol string `json:"protocol"`
			Type     uint8  `json:"icmp_type"`
			Code     uint8  `json:"icmp_code"`
		} `json:"packet"`
		From       flowEnd  `json:"source"`
		To         flowEnd  `json:"destination"`
		Seconds    *float64 `json:"duration_seconds"`
		EndUnknown bool     `json:"end_unknown"`
		Sent       struct {
			Bytes uint64 `json:"bytes"`
		} `json:"sent"`
		Received struct {
			Bytes uint64 `json:"bytes"`
		} `json:"received"`
	}
	if err := json.Unmarshal(line, &x); err != nil {
		return err
	}
	p := x.Packet
	reason := printable(x.Reason)
	if p.Type != 0 || p.Code != 0 {
		reason += fmt.Sprintf(" (type %d code %d)", p.Type, p.Code)
	}
	switch {
	case x.EndUnknown:
		reason += "; its end is not known"
	case x.Seconds != nil:
		reason += fmt.Sprintf("; %v, %s sent, %s received", time.Duration(*x.Seconds*float64(time.Second)).Round(time.Millisecond), size(x.Sent.Bytes), size(x.Received.Bytes))
	}
	_, err := fmt.Fprintf(w, flowColumns, x.Time.Local().Format("15:04:05.000000"), printable(x.Event), printable(strings.ToLower(p.Protocol)),
		x.From.name(p.Source, p.FromPort), x.To.name(p.To, p.Port), reason)
	return err
}

// size returns a number of bytes for people.
func size(n uint64) string {
	switch {
	case n < 10_000:
		return fmt.Sprintf("%d B", n)
	case n < 10_000_000:
		return fmt.Sprintf("%d kB", n/1000)
	}
	return fmt.Sprintf("%d MB", n/1_000_000)
}
