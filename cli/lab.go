package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/lab"
	"github.com/spf13/cobra"
)

// labFlags say which lab a command means.
type labFlags struct{ name, dir string }

func (f *labFlags) path() string {
	if f.dir != "" {
		return f.dir
	}
	return lab.DefaultDir(f.name)
}

func (f *labFlags) open() (*lab.Lab, error) { return lab.Open(f.path()) }

// command returns how silk is called for this lab, for hints.
func (f *labFlags) command() string {
	self := os.Args[0]
	if filepath.Base(self) != "silk" {
		self = "silk"
	}
	switch {
	case f.dir != "":
		return self + " lab --dir " + f.dir
	case f.name != "lab":
		return self + " lab --name " + f.name
	}
	return self + " lab"
}

func labCommand() *cobra.Command {
	f := &labFlags{}
	c := &cobra.Command{
		Use: "lab", Short: "Build a whole Silk network on this machine",
		Long: "A lab is several hosts as network namespaces, the real programs on them, and containers.\n" +
			"It lives in namespaces of its own and does not touch this machine's network.",
		Args: func(c *cobra.Command, args []string) error { // of what is none of the commands below
			if len(args) > 0 {
				return fmt.Errorf("unknown command %q for %q: see %s --help", args[0], c.CommandPath(), c.CommandPath())
			}
			return nil
		},
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.PersistentFlags().StringVar(&f.name, "name", "lab", "name of the lab")
	c.PersistentFlags().StringVar(&f.dir, "dir", "", "directory of the lab (default "+lab.DefaultDir("NAME")+")")
	c.AddCommand(labUp(f), labStatus(f), labExec(f), labAdd(f), labAddHost(f), labHidden(f, "launch"), labHidden(f, "keep"), labHidden(f, "supervise"), labRespond())
	c.AddCommand(
		onLab(f, "rm NAME", "Remove a container, or a host with its containers", (*lab.Lab).Remove),
		onLab(f, "kill PROGRAM|HOST", "Kill a program or cut a host's power; it comes back\n\n"+
			"PROGRAM is controller, policy-server, nats-server, outside, supervisor, keeper, HOST/silk-daemon, HOST/vxlan-policy-agent, HOST/silk-dns, HOST/silk-tls, or CONTAINER for its responder.", (*lab.Lab).Kill),
		onLab(f, "partition HOST", "Cut a host off the underlay", (*lab.Lab).Partition),
		onLab(f, "heal HOST", "Undo partition", (*lab.Lab).Heal),
		&cobra.Command{Use: "down", Short: "Remove the lab and everything of it", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
			l, err := f.open()
			if errors.Is(err, fault.NotFound) {
				_, err = fmt.Fprintf(c.OutOrStdout(), "no lab in %s\n", f.path())
				return err
			}
			if err == nil {
				err = l.Down(c.Context())
			}
			if err == nil {
				_, err = fmt.Fprintf(c.OutOrStdout(), "lab %q is down: nothing of it is left\n", f.name)
			}
			return err
		}})
	return c
}

// onLab returns a command that does one thing with one name.
func onLab(f *labFlags, use, text string, do func(*lab.Lab, context.Context, string) error) *cobra.Command {
	short, long, _ := cut(text)
	return &cobra.Command{Use: use, Short: short, Long: long, Args: cobra.ExactArgs(1), RunE: func(c *cobra.Command, args []string) error {
		l, err := f.open()
		if err != nil {
			return err
		}
		return do(l, c.Context(), args[0])
	}}
}

func cut(text string) (short, long string, ok bool) {
	for i := range text {
		if text[i] == '\n' {
			return text[:i], text, true
		}
	}
	return text, text, false
}

func labUp(f *labFlags) *cobra.Command {
	var o lab.Options
	var wait time.Duration
	c := &cobra.Command{Use: "up", Short: "Build the lab, or adopt the one that is there", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		begun := time.Now()
		o.Name, o.Dir = f.name, f.path()
		if o.Containers == 0 {
			o.Containers = -1
		}
		if o.Hosts == 0 {
			o.Hosts = -1
		}
		_, err := lab.Open(f.path())
		found := err == nil
		l, err := lab.Up(c.Context(), o)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(c.Context(), wait)
		defer cancel()
		s, err := l.AwaitWhole(ctx)
		word := "is up"
		switch {
		case err != nil:
			word = "is not whole yet"
		case found:
			word = "was there already, and is whole"
		}
		out := c.OutOrStdout()
		fmt.Fprintf(out, "lab %q %s: %d hosts, %d containers, overlay %v, %.1f s\n\n", s.Name, word, len(s.Hosts), len(s.Containers), s.Overlay, time.Since(begun).Seconds())
		if werr := s.Write(out); werr != nil {
			return werr
		}
		if err == nil {
			s.WriteHints(out, f.command())
		}
		if found {
			warnIgnored(c, f.command())
		}
		return err
	}}
	c.Flags().IntVar(&o.Hosts, "hosts", 3, "number of hosts")
	c.Flags().IntVar(&o.Containers, "containers", 2, "number of containers on each host")
	c.Flags().StringVar((*string)(&o.Policy), "policy", string(lab.PolicyRequired), "required: containers are closed to each other until a policy opens them; none: they are open")
	c.Flags().BoolVar(&o.Outside, "outside", false, "add a place outside of the overlay, which containers ask and which asks mapped ports")
	c.Flags().BoolVar(&o.Names, "names", false, "containers find each other by name and speak TLS (needs nats-server)")
	c.Flags().StringVar(&o.Programs, "programs", "", "directory of the silk programs (default that of this one)")
	c.Flags().DurationVar(&wait, "wait", time.Minute, "how long to wait until everybody reaches everybody")
	return c
}

// warnIgnored names the flags that say what a new lab is to be, and were given for one that is there.
func warnIgnored(c *cobra.Command, command string) {
	for _, name := range []string{"hosts", "containers", "outside", "names", "programs"} {
		if c.Flags().Changed(name) {
			fmt.Fprintf(c.ErrOrStderr(), "--%s is for a new lab and changed nothing: use %s add-host, add and rm, or down first\n", name, command)
		}
	}
}

func labStatus(f *labFlags) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{Use: "status", Short: "Show hosts, leases, containers and who reaches whom", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		l, err := f.open()
		if err != nil {
			return err
		}
		s, err := l.Status(c.Context())
		if err != nil {
			return err
		}
		if asJSON {
			e := json.NewEncoder(c.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(s)
		}
		return s.Write(c.OutOrStdout())
	}}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, with programs and process numbers")
	return c
}

func labExec(f *labFlags) *cobra.Command {
	c := &cobra.Command{Use: "exec HOST|CONTAINER -- COMMAND [ARG...]", Short: "Run a command on a host or in a container", Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			l, err := f.open()
			if err != nil {
				return err
			}
			command := args[1:]
			if command[0] == "--" {
				command = command[1:]
			}
			// Signals are the command's to judge.
			code, err := l.Exec(context.WithoutCancel(c.Context()), args[0], command, os.Stdin, os.Stdout, os.Stderr)
			if err == nil && code != 0 {
				err = exitCode(code)
			}
			return err
		}}
	c.Flags().SetInterspersed(false)
	return c
}

func labAdd(f *labFlags) *cobra.Command {
	var host, group string
	var publish []string
	c := &cobra.Command{Use: "add NAME", Short: "Add a container", Args: cobra.ExactArgs(1), RunE: func(c *cobra.Command, args []string) error {
		var ports []lab.Port
		for _, text := range publish {
			p, err := lab.ParsePort(text)
			if err != nil {
				return err
			}
			ports = append(ports, p)
		}
		l, err := f.open()
		if err != nil {
			return err
		}
		_, err = l.AddTo(c.Context(), args[0], host, group, ports...)
		return err
	}}
	c.Flags().StringVar(&host, "host", "", "where (default the host with the fewest containers)")
	c.Flags().StringVar(&group, "group", "", "policy group that it belongs to (default web)")
	c.Flags().StringArrayVarP(&publish, "publish", "p", nil, "HOSTPORT:PORT, a TCP port of its host that leads to one of the container's; may be repeated")
	return c
}

func labAddHost(f *labFlags) *cobra.Command {
	return &cobra.Command{Use: "add-host [NAME]", Short: "Add a host", Args: cobra.MaximumNArgs(1), RunE: func(c *cobra.Command, args []string) error {
		l, err := f.open()
		if err != nil {
			return err
		}
		name, err := l.AddHost(c.Context(), append(args, "")[0])
		if err == nil {
			_, err = fmt.Fprintln(c.OutOrStdout(), name)
		}
		return err
	}}
}

// labHidden returns one of the lab's own processes.
func labHidden(f *labFlags, name string) *cobra.Command {
	fresh := false
	c := &cobra.Command{Use: name, Hidden: true, Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		log, _ := service.Logger("silk-lab-"+name, slog.LevelInfo)
		switch name {
		case "launch":
			return lab.Launch(c.Context(), f.dir, fresh)
		case "keep":
			return lab.Keep(c.Context(), f.dir, log)
		}
		return lab.Supervise(c.Context(), f.dir, log)
	}}
	if name == "launch" {
		c.Flags().BoolVar(&fresh, "fresh", false, "set up the namespaces")
	}
	return c
}

func labRespond() *cobra.Command {
	var name string
	c := &cobra.Command{Use: "respond", Hidden: true, Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		log, _ := service.Logger("silk-lab-respond", slog.LevelInfo)
		return lab.Respond(c.Context(), name, log)
	}}
	c.Flags().StringVar(&name, "as", "", "what to answer")
	return c
}
