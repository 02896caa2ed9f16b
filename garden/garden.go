// Package garden is the program garden-external-networker, the network plugin of Garden: its server runs it once to attach a
// container (up), once to detach it (down), and while the container lives to give it one more port (net-in) or more rules of
// what it may reach (net-out, bulk-net-out).
//
// It wires nothing itself: it names the container's namespace by a bind mount, gives out ports of the host, and has the
// plugins of a CNI configuration do the rest. It keeps what Garden's earlier networker keeps, in the same form: the bind
// mounts, the file of ports, and libcni's cache of results.
//
// Use: os.Exit(Run(ctx, OS())).
package garden

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
)

// Env is what the program gets from and gives to Garden. Its network namespace is that of the calling thread.
type Env struct {
	Args   []string // without the program's name
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// OS returns the environment of the process.
func OS() Env { return Env{os.Args[1:], os.Stdin, os.Stdout, os.Stderr} }

// defaultPrefix begins what is said on stderr until the configuration is known.
const defaultPrefix = "cfnetworking"

// notice is an error whose text is a sentence.
type notice string

// Error returns the sentence.
func (n notice) Error() string { return string(n) }

// errHelp is what somebody learns who runs the program by hand.
const errHelp = notice("this is a plugin for Garden-runC.  Don't run it directly.")

// networker is one operation on one container.
type networker struct {
	env    Env
	cfg    config
	handle string
	prefix string
}

// Run carries out what env asks for and returns the exit code, 0 or 1.
func Run(ctx context.Context, env Env) int {
	n := &networker{env: env, prefix: defaultPrefix}
	if err := n.run(ctx); err != nil {
		fmt.Fprintf(env.Stderr, "%s: %s\n", n.prefix, oneLine(err.Error()))
		return 1
	}
	return 0
}

// oneLine keeps an error to the one line that Garden logs.
func oneLine(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c == '\n' || c == '\r' {
			b[i] = ' '
		}
	}
	return string(b)
}

var actions = map[string]func(*networker, context.Context) error{
	"up": (*networker).up, "down": (*networker).down,
	"net-in": (*networker).netIn, "net-out": (*networker).netOut, "bulk-net-out": (*networker).bulkNetOut,
}

func (n *networker) run(ctx context.Context) error {
	a, err := parseArgs(n.env.Args)
	if err != nil {
		return err
	}
	n.cfg, n.handle, n.prefix = a.config, a.handle, a.config.LogPrefix
	for _, w := range a.warnings {
		n.warn("%s", w)
	}
	do, ok := actions[a.action]
	if !ok {
		return fmt.Errorf("unrecognized action: %s", a.action)
	}
	if !validHandle(n.handle) {
		if a.action == "down" { // nothing was ever made for it, and Garden has to get rid of the container
			n.warn("handle %q is none that a container can have: nothing to take down", n.handle)
			return nil
		}
		return fmt.Errorf("handle %q: expected letters, digits and . _ - after the first", n.handle)
	}
	return do(n, ctx)
}

// warn says something that is no failure of the operation.
func (n *networker) warn(format string, args ...any) {
	fmt.Fprintf(n.env.Stderr, "%s: %s\n", n.prefix, oneLine(fmt.Sprintf(format, args...)))
}

// maxInput bounds what is read of Garden, in bytes.
const maxInput = 64 << 20

// read reads what Garden says.
func (n *networker) read(into any) error {
	b, err := io.ReadAll(io.LimitReader(n.env.Stdin, maxInput+1))
	if err != nil {
		return fmt.Errorf("read stdin: %w", err)
	}
	if len(b) > maxInput {
		return fmt.Errorf("read stdin: more than %d bytes", maxInput)
	}
	return json.Unmarshal(b, into)
}

// print answers Garden, by one write.
func (n *networker) print(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write answer: %w", err)
	}
	if _, err := n.env.Stdout.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("write answer: %w", err)
	}
	return nil
}

// validHandle reports whether a container of that handle can be attached: it is its id for the plugins and the name of a file.
func validHandle(s string) bool { return len(s) <= maxHandle && endpoint.ValidID(s) }

// maxHandle leaves room for what is put around a handle in the name of a file, which has 255 bytes at most.
const maxHandle = 190

// undo takes back what an operation has done so far, the last first.
type undo []func(context.Context) error

func (u *undo) add(f func(context.Context) error) { *u = append(*u, f) }

// undoTime bounds taking back, beyond what the plugins may take.
const undoTime = 30 * time.Second

// run takes everything back, also when the operation's own time is up, and returns err with what failed on the way.
func (u undo) run(ctx context.Context, cni time.Duration, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cni+undoTime)
	defer cancel()
	for i := len(u) - 1; i >= 0; i-- {
		if e := u[i](ctx); e != nil {
			err = fmt.Errorf("%w; taking it back: %w", err, e)
		}
	}
	return err
}
