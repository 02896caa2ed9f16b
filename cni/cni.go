// Package cni is the program silk-cni: a plugin of the Container Network Interface (specification 1.1.0, and 1.0.0, 0.4.0
// and 0.3.1), run once for every operation on a container.
//
// It wires one container (endpoint) and makes sure that its traffic can leave the host (nat). It allocates nothing
// itself, keeps no state beside the endpoint records and the store of earlier releases, and needs silk-daemon only for an
// ADD. It starts in about a millisecond and must go on doing so: no net/http, no logging library, no database.
//
// It is also the program cni-wrapper-plugin, for the configurations of the plugin that was deployed around silk-cni.
//
// Use: os.Exit(Run(ctx, OS())).
package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	_ "code.cloudfoundry.org/silk/internal/roomy"
)

// supported lists the versions of the specification, in order.
var supported = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

const newest = "1.1.0"

// limit bounds an operation. What takes time is waiting for another process that works on the same endpoint.
const limit = 60 * time.Second

// maxInput bounds a configuration in bytes.
const maxInput = 8 << 20

// Env is what the plugin gets from and gives to the runtime. Its network namespace is that of the calling thread.
type Env struct {
	Getenv func(string) string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// OS returns the environment of the process.
func OS() Env { return Env{os.Getenv, os.Stdin, os.Stdout, os.Stderr} }

// call is one operation.
type call struct {
	command   string
	container string
	netns     string
	ifname    string
	args      string
	override  bool // the container may be in the plugin's own namespace
	input     []byte
	env       Env
	cfg       config
	wrapper   *wrapper // nil for silk-cni
}

// command says what an operation needs.
type command struct {
	since  string   // the first version of the specification that has it
	needs  []string // environment
	run    func(*call, context.Context) error
	config bool // it needs a usable configuration, not only a readable one
}

var commands = map[string]command{
	"ADD":    {"0.3.1", []string{envContainer, envNetNS, envInterface}, (*call).add, true},
	"DEL":    {"0.3.1", []string{envContainer, envInterface}, (*call).del, false},
	"CHECK":  {"0.4.0", []string{envContainer, envNetNS, envInterface}, (*call).check, true},
	"GC":     {"1.1.0", nil, (*call).gc, false},
	"STATUS": {"1.1.0", nil, (*call).status, true},
}

const (
	envCommand   = "CNI_COMMAND"
	envContainer = "CNI_CONTAINERID"
	envNetNS     = "CNI_NETNS"
	envInterface = "CNI_IFNAME"
	envArgs      = "CNI_ARGS"
	envOverride  = "CNI_NETNS_OVERRIDE"
)

// Run carries out the operation that env asks for, in the namespace of the calling thread, and returns the exit code.
func Run(ctx context.Context, env Env) int { return run(ctx, &call{env: env}) }

func run(ctx context.Context, c *call) int {
	p := &patience{Context: ctx}
	defer p.stop()
	ctx = p
	env := c.env
	c.command = env.Getenv(envCommand)
	var err error
	switch c.command {
	case "":
		fmt.Fprintf(env.Stderr, "%s is a CNI plugin: a container runtime runs it with %s set\nCNI protocol versions supported: %s\n", c.name(), envCommand, strings.Join(supported, ", "))
		return 0
	case "VERSION":
		err = c.print(struct {
			CNIVersion string   `json:"cniVersion"`
			Supported  []string `json:"supportedVersions"`
		}{newest, supported})
	default:
		err = c.dispatch(ctx)
	}
	if err == nil {
		return 0
	}
	c.print(failureOf(err).output(c.cfg.CNIVersion))
	return 1
}

// patience is a context that ends after the limit. Its clock starts when somebody first waits for it: most operations never wait,
// and a timer wakes threads.
type patience struct {
	context.Context

	mu     sync.Mutex
	waited context.Context
	cancel context.CancelFunc
}

// stop ends the context.
func (p *patience) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cancel != nil {
		p.cancel()
	}
}

// Done returns a channel that is closed when the limit is over.
func (p *patience) Done() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waited == nil {
		p.waited, p.cancel = context.WithTimeout(p.Context, limit)
	}
	return p.waited.Done()
}

// Err returns why Done is closed, nil before that.
func (p *patience) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waited == nil {
		return p.Context.Err()
	}
	return p.waited.Err()
}

// indent is what the JSON that runtimes get is indented by, level by level.
const indent = "    "

// print writes a value as the runtime expects it.
func (c *call) print(v any) error {
	var b []byte
	var err error
	r, ok := v.(result)
	if ok {
		b, ok = r.plain()
	}
	if !ok {
		b, err = json.MarshalIndent(v, "", indent)
	}
	if err == nil {
		_, err = c.env.Stdout.Write(append(b, '\n'))
	}
	if err != nil {
		return &failure{code: codeIO, msg: "write result", err: err}
	}
	return nil
}

// name returns the program's.
func (c *call) name() string {
	if c.wrapper != nil {
		return "cni-wrapper-plugin"
	}
	return "silk-cni"
}

// warn says something that the runtime's operator may want to know of an operation that succeeds.
func (c *call) warn(format string, args ...any) {
	fmt.Fprintf(c.env.Stderr, "%s: %s %s: %s\n", c.name(), c.command, c.container, fmt.Sprintf(format, args...))
}

func (c *call) dispatch(ctx context.Context) error {
	cmd, ok := commands[c.command]
	if !ok {
		return &failure{code: codeEnvironment, msg: fmt.Sprintf("unknown %s: %s", envCommand, c.command)}
	}
	if err := c.readEnvironment(cmd); err != nil {
		return err
	}
	var err error
	if c.input, err = io.ReadAll(io.LimitReader(c.env.Stdin, maxInput+1)); err != nil || len(c.input) > maxInput {
		return &failure{code: codeIO, msg: "read network configuration from stdin", err: err}
	}
	if c.wrapper != nil {
		if err := c.unwrap(cmd.config); err != nil {
			return err
		}
	}
	if c.cfg, err = decode(c.input, !cmd.config); err != nil {
		if c.command == "STATUS" && c.cfg.CNIVersion != "" {
			return unavailable("unusable network configuration", err)
		}
		return err
	}
	if !slices.Contains(supported, c.cfg.CNIVersion) {
		return &failure{code: codeVersion, msg: "incompatible CNI versions", err: fmt.Errorf("config is %q, plugin supports %q", c.cfg.CNIVersion, supported)}
	}
	if slices.Index(supported, c.cfg.CNIVersion) < slices.Index(supported, cmd.since) {
		return &failure{code: codeVersion, msg: "config version does not allow " + c.command, err: fmt.Errorf("config is %q, %s came with %s", c.cfg.CNIVersion, c.command, cmd.since)}
	}
	if cmd.config {
		if err := c.cfg.validate(); err != nil {
			if c.command == "STATUS" {
				return unavailable("unusable network configuration", err)
			}
			return &failure{code: codeConfig, msg: "invalid network configuration", err: err}
		}
	}
	return cmd.run(c, ctx)
}

// readEnvironment reads and judges the environment. What is optional for an operation is not judged.
func (c *call) readEnvironment(cmd command) error {
	var missing []string
	for _, n := range cmd.needs {
		if c.env.Getenv(n) == "" {
			missing = append(missing, n)
		}
	}
	if len(missing) > 0 {
		return &failure{code: codeEnvironment, msg: fmt.Sprintf("required env variables [%s] missing", strings.Join(missing, ","))}
	}
	c.container, c.netns, c.ifname = c.env.Getenv(envContainer), c.env.Getenv(envNetNS), c.env.Getenv(envInterface)
	c.args = c.env.Getenv(envArgs)
	o := c.env.Getenv(envOverride)
	c.override = o == "1" || strings.EqualFold(o, "true")
	if slices.Contains(cmd.needs, envContainer) && !endpoint.ValidID(c.container) {
		return &failure{code: codeEnvironment, msg: "invalid characters in containerID", err: fmt.Errorf("%s is %q", envContainer, c.container)}
	}
	if slices.Contains(cmd.needs, envInterface) {
		if why := badInterface(c.ifname); why != "" {
			return &failure{code: codeEnvironment, msg: "interface name " + why, err: fmt.Errorf("%s is %q: interface name should be less than 16 characters, none of them / : or white space", envInterface, c.ifname)}
		}
	}
	return nil
}

// openNetNS opens the container's namespace. It may not be the plugin's own.
func (c *call) openNetNS() (*kernel.NS, error) {
	ns, err := kernel.OpenNS(c.netns)
	if err != nil {
		return nil, &failure{code: codeNetNS, msg: "open network namespace", err: err, hint: "the container is gone, or " + envNetNS + " does not name its namespace"}
	}
	if c.override {
		return ns, nil
	}
	own, err1 := kernel.CurrentID()
	id, err2 := ns.ID()
	if err1 != nil || err2 != nil || own == id {
		ns.Close()
		return nil, &failure{code: codeNetNS, msg: "plugin's netns and netns from " + envNetNS + " should not be the same", err: fmt.Errorf("%s is %s", envNetNS, c.netns)}
	}
	return ns, nil
}

// badInterface says what is wrong with an interface name, "" for nothing. The limits are those of the kernel.
func badInterface(s string) string {
	switch {
	case s == "":
		return "is empty"
	case len(s) > 15:
		return "is too long"
	case s == "." || s == "..":
		return "is . or .."
	case !utf8.ValidString(s) || strings.Contains(s, "%"): // the kernel would make another name of a %
		return "is no plain text"
	case strings.ContainsAny(s, "/:") || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f || r == 0x85 || r == 0xa0 }):
		return "contains / or : or whitespace characters"
	}
	return ""
}
