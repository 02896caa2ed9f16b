package lab

import (
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// ExitError is a command that ended with a status other than 0.
type ExitError struct {
	Command string
	Code    int
	Stderr  string // its end
}

// Error returns the command, its status and what it said last.
func (e *ExitError) Error() string {
	return strings.TrimSpace(fmt.Sprintf("%s ended with %d: %s", e.Command, e.Code, e.Stderr))
}

// Write prints the status for people: hosts, containers, and the matrix of who reaches whom.
func (s Status) Write(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "HOST\tUNDERLAY\tLEASE\tMTU\tCONTAINERS\tSTATE")
	for _, h := range s.Hosts {
		var cs []string
		for _, c := range s.Containers {
			if c.Host == h.Name {
				cs = append(cs, c.label(s)+" "+text(c.Address))
			}
		}
		lease := "-"
		if h.Lease.IsValid() {
			lease = h.Lease.String()
		}
		fmt.Fprintf(t, "%s\t%v\t%s\t%s\t%s\t%s\n", h.Name, h.Underlay, lease, number(h.MTU), orDash(strings.Join(cs, ", ")), h.state())
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, c := range s.Containers {
		if c.Error != "" {
			fmt.Fprintf(w, "%s: %s\n", c.Name, c.Error)
		}
	}
	for _, p := range s.Programs {
		if p.PID == 0 {
			fmt.Fprintf(w, "%s does not run: %s\n", p.Name, orDash(p.Error))
		}
	}
	if len(s.Paths) == 0 {
		fmt.Fprintln(w, "\nno two containers to connect")
	} else if err := s.writeMatrix(w); err != nil {
		return err
	}
	if err := s.writeNames(w); err != nil {
		return err
	}
	return s.writeEdge(w)
}

// writeNames prints which names stand for whom: those of groups, and the containers' own that are not known everywhere.
func (s Status) writeNames(w io.Writer) error {
	if len(s.Names) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tADDRESSES\tKNOWN")
	for _, n := range s.Names {
		if own, _ := strings.CutSuffix(n.Name, "."+Domain); s.isContainer(own) && len(n.Missing) == 0 {
			continue // there may be many, and each says what is to be expected
		}
		var all []string
		for _, a := range n.Addresses {
			all = append(all, a.String())
		}
		known := fmt.Sprintf("on %d hosts", len(s.Hosts))
		if len(n.Missing) > 0 {
			known = "not, or not all, on " + strings.Join(n.Missing, ", ")
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", n.Name, orDash(strings.Join(all, " ")), known)
	}
	return t.Flush()
}

func (s Status) isContainer(name string) bool {
	return slices.ContainsFunc(s.Containers, func(c Container) bool { return c.Name == name && c.Group != name })
}

func (s Status) writeMatrix(w io.Writer) error {
	var names []string
	for _, p := range s.Paths {
		if len(names) == 0 || names[len(names)-1] != p.From {
			names = append(names, p.From)
		}
	}
	fmt.Fprintln(w, "\nwho reaches whom (row asks column by HTTP)")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprint(t, s.heading(names))
	good, denied := 0, 0
	for _, from := range names {
		fmt.Fprint(t, s.label(from))
		for _, to := range names {
			p := s.Path(from, to)
			if from == to {
				fmt.Fprint(t, "\t-")
				continue
			}
			fmt.Fprint(t, "\t"+p.word())
			switch {
			case p.OK:
				good++
			case p.Deny:
				denied++
			}
		}
		fmt.Fprintln(t)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(w, "%d of %d connections work", good, len(s.Paths))
	if denied > 0 {
		fmt.Fprintf(w, ", policy denies %d", denied)
	}
	_, err := fmt.Fprintln(w)
	return err
}

// writeEdge prints who reaches the outside, and whom the outside reaches.
func (s Status) writeEdge(w io.Writer) error {
	if len(s.Edge) == 0 {
		return nil
	}
	fmt.Fprintln(w, "\nwho reaches the outside (row asks column by HTTP)")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	from, mapped := "", false
	for _, a := range outsideAddresses() {
		fmt.Fprintf(t, "\t%v", a)
	}
	for _, p := range s.Edge {
		switch {
		case p.Via != "":
			if !mapped {
				fmt.Fprint(t, "\n\nmapped ports, asked from outside")
			}
			mapped = true
			at := strings.LastIndexByte(p.To, ':')
			fmt.Fprintf(t, "\n%s -> %s%s\t%s", p.To[:at], s.label(p.Via), p.To[at:], p.word())
			continue
		case p.From != from:
			from = p.From
			fmt.Fprint(t, "\n"+s.label(from))
		}
		fmt.Fprint(t, "\t"+p.word())
	}
	fmt.Fprintln(t)
	return t.Flush()
}

// word is what a path comes to.
func (p Path) word() string {
	switch {
	case p.OK:
		return fmt.Sprintf("ok %.1fms", float64(p.Time)/float64(time.Millisecond))
	case p.Deny:
		return "deny"
	}
	return "FAIL"
}

// WriteHints prints what to try next.
func (s Status) WriteHints(w io.Writer, command string) {
	if len(s.Hosts) == 0 {
		return
	}
	from, host := "", s.Hosts[0].Name
	var to netip.Addr
	for _, c := range s.Containers {
		switch {
		case from == "":
			from, host = c.Name, c.Host
		case c.Host != host && !to.IsValid() && (s.Policy != PolicyRequired || c.Group == groups[1]):
			to = c.Address
		}
	}
	fmt.Fprintln(w, "\ntry next")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if to.IsValid() {
		fmt.Fprintf(t, "  %s exec %s -- %s\tfrom a container to one on another host\n", command, from, asking(to))
	}
	if s.Policy == PolicyRequired {
		fmt.Fprintf(t, "  %s exec %s -- silk policy add %s %s --ports %d --wait\tlet one application talk to the other, and see when that is in force\n", command, rolePolicyServer, groups[0], groups[1], HTTPPort)
		fmt.Fprintf(t, "  %s status\twho reaches whom now\n", command)
	}
	if len(s.Names) > 0 && from != "" {
		name := groups[1] + "." + Domain
		fmt.Fprintf(t, "  %s exec %s -- dig +short %s\twhere an application is\n", command, from, name)
	}
	fmt.Fprintf(t, "  %s exec %s -- ip route\tthe paths to the other hosts\n", command, host)
	fmt.Fprintf(t, "  %s kill controller\tthe network goes on; it is restarted\n", command)
	fmt.Fprintf(t, "  %s partition %s\tthen status, then heal %s\n", command, host, host)
	fmt.Fprintf(t, "  %s add web --host %s\tone more container\n", command, host)
	fmt.Fprintf(t, "  %s down\tremove everything\n", command)
	t.Flush()
	fmt.Fprintf(w, "logs are in %s\n", filepath.Join(s.Dir, "log"))
}

// asking returns a command that shows that a responder is reached, by a program that this machine has.
func asking(to netip.Addr) string {
	url := fmt.Sprintf("http://%v:%d", to, HTTPPort)
	if _, err := exec.LookPath("curl"); err == nil {
		return "curl -s " + url
	}
	if _, err := exec.LookPath("wget"); err == nil {
		return "wget -qO- " + url
	}
	return "ping -c 3 " + to.String()
}

// state is the host's condition in a few words.
func (h Host) state() string {
	parts := []string{h.State}
	for _, p := range []struct {
		say  bool
		text string
	}{{h.Partitioned, "partitioned"}, {h.Leaving, "leaving"}, {h.Reason != "", h.Reason}, {h.Enforcement != "" && h.Enforcement != Ready, strings.TrimSuffix("policy "+h.Enforcement+": "+h.Unenforced, ": ")}, {h.Naming != "" && h.Naming != Ready, strings.TrimSuffix("names "+h.Naming+": "+h.Unnamed, ": ")}, {h.Proxying != "" && h.Proxying != Ready, strings.TrimSuffix("TLS "+h.Proxying+": "+h.Unproxied, ": ")},
		{h.Error != "" && h.State == Ready, h.Error}} {
		if p.say {
			parts = append(parts, p.text)
		}
	}
	return strings.ReplaceAll(strings.Join(parts, ", "), "\n", "; ")
}

func text(a netip.Addr) string {
	if !a.IsValid() {
		return "(not attached)"
	}
	return a.String()
}

func number(n int) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
