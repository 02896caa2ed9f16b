// Package lab is a whole Silk network on one machine: hosts as network namespaces, joined by an underlay bridge, with the
// real programs and real containers on them.
//
// A lab lives in namespaces of its own (mounts, network, and users when it is not run by root) and never touches the
// machine's interfaces, routes or files outside its directory. Two processes stand behind it: the supervisor makes what is
// wanted and restarts what dies, the keeper restarts the supervisor. What is wanted is in DIR/lab.json; what is there is
// read from the kernel, so either process may be killed at any time and the next one goes on. Every process of a lab carries
// the lab's directory in its environment: that, and not a list of numbers, is how they are found again.
//
// It is not a test double: nothing in it is simulated but the machines. Use: l, err := lab.Up(ctx, lab.Options{}), then
// l.Status, l.Exec, l.Kill, l.Down. Command silk is a thin layer over this.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// Options say what Up builds.
type Options struct {
	Name       string // of the lab, default "lab"
	Dir        string // holds everything that the lab writes; default DefaultDir(Name)
	Hosts      int    // default 3, at most MaxHosts
	Containers int    // per host, default 2; -1: none
	Policy     Policy // default PolicyRequired
	Outside    bool   // a place outside that containers may reach, and that reaches their mapped ports
	Names      bool   // containers find each other by name, and TLS ends in front of them: needs nats-server
	Programs   string // directory of Silk's programs; default that of this program
	nats       string // path of nats-server, with Names
	BridgeNF   bool   // leave bridge-nf-call-* on in the underlay's namespace
}

// Limits of a lab.
const (
	MaxHosts      = 100
	MaxContainers = 200 // per host
)

// The addresses of every lab. They exist in its namespaces only.
var (
	Overlay  = netip.MustParsePrefix("10.255.0.0/16")
	underlay = netip.MustParsePrefix("10.0.0.0/24")
)

// Lab is a handle on a lab that runs. It holds nothing open.
type Lab struct{ dir string }

// Dir returns the lab's directory; its logs are in Dir()/log.
func (l *Lab) Dir() string { return l.dir }

// DefaultDir returns where a lab of that name lives: /run/silk-lab for root, else below XDG_RUNTIME_DIR or the temporary directory.
func DefaultDir(name string) string {
	switch run := os.Getenv("XDG_RUNTIME_DIR"); {
	case os.Geteuid() == 0:
		return filepath.Join("/run/silk-lab", name)
	case run != "":
		return filepath.Join(run, "silk-lab", name)
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("silk-lab-%d", os.Geteuid()), name)
}

// reserved names stand for parts of the lab itself, or for devices of every machine: a host's name is that of its port.
var reserved = []string{controlName, outsideName, underlayName, roleController, rolePolicyServer, roleNATS, roleSupervisor, roleKeeper, roleExec, "lo", "all", "default"}

var nameForm = regexp.MustCompile(`^[a-z][a-z0-9-]{0,14}$`)

// checkName refuses names that cannot be a host's, a container's or a lab's.
func checkName(name string) error {
	if !nameForm.MatchString(name) {
		return fault.Invalidf("name %q: expected a lower-case letter, then up to 14 letters, digits or hyphens", name)
	}
	if slices.Contains(reserved, name) {
		return fault.Invalidf("name %q is taken by the lab itself", name)
	}
	return nil
}

func (o *Options) fill() error {
	if o.Name == "" {
		o.Name = "lab"
	}
	if err := checkName(o.Name); err != nil {
		return err
	}
	if o.Dir == "" {
		o.Dir = DefaultDir(o.Name)
	}
	if o.Hosts == 0 {
		o.Hosts = 3
	}
	switch o.Containers {
	case 0:
		o.Containers = 2
	case -1:
		o.Containers = 0
	}
	if o.Hosts < 1 || o.Hosts > MaxHosts || o.Containers < 0 || o.Containers > MaxContainers {
		return fault.Invalidf("the number of hosts is expected to be 1 to %d, and that of containers on each at most %d", MaxHosts, MaxContainers)
	}
	if o.Programs == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		o.Programs = filepath.Dir(self)
	}
	var err error
	if o.Programs, err = filepath.Abs(o.Programs); err != nil {
		return err
	}
	if strings.HasPrefix(o.Programs, "/run/") {
		return fault.Invalidf("the programs lie in %s, and a lab has a /run of its own: copy them elsewhere", o.Programs)
	}
	if o.Policy == "" {
		o.Policy = PolicyRequired
	}
	if o.Policy != PolicyRequired && o.Policy != PolicyNone {
		return fault.Invalidf("policy %q: expected required or none", o.Policy)
	}
	for _, p := range o.needs() {
		if _, err := os.Stat(filepath.Join(o.Programs, p)); err != nil {
			return fault.Invalidf("a lab runs the real programs, expected beside each other: %w: build them all (make build)", err)
		}
	}
	if o.Names {
		if o.nats, err = findNATS(o.Programs); err != nil {
			return err
		}
	}
	return nil
}

// needs returns the programs that the lab runs.
func (o *Options) needs() []string {
	all := o.Policy.programs()
	if o.Names {
		all = append(all, namePrograms...)
	}
	return all
}

// Up builds the lab, or adopts the one that is in the directory already, and returns when its supervisor answers; the
// network may still be forming (AwaitWhole). The options of a lab that exists stay as they are.
func Up(ctx context.Context, o Options) (*Lab, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	dir, unlock, err := claim(ctx, o.Dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	l := &Lab{dir}
	if _, err := readJournal(dir); errors.Is(err, fs.ErrNotExist) {
		if err := newJournal(o).save(dir); err != nil {
			return nil, errors.Join(fmt.Errorf("write the lab's journal: %w", err), removeLab(dir)) // no Down would find it
		}
	} else if err != nil {
		return nil, err
	}
	return l, l.ensure(ctx)
}

// Open returns the lab in dir. fault.NotFound if there is none.
func Open(dir string) (*Lab, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err == nil {
		_, err = readJournal(real)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.NotFoundf("no lab in %s: silk lab up makes one", dir)
	}
	return &Lab{real}, err
}

// AwaitWhole waits until every host has a lease and every container reaches every other one, or with PolicyRequired until every host
// enforces what policies say, and returns the first such status. When ctx ends it returns the last status and fault.Unavailable; when the
// lab is taken down meanwhile, fault.NotFound.
func (l *Lab) AwaitWhole(ctx context.Context) (Status, error) {
	var last Status
	for {
		s, err := l.Status(ctx)
		switch {
		case errors.Is(err, fault.NotFound):
			return last, err
		case err == nil && s.Whole():
			return s, nil
		case err == nil:
			last = s
		}
		select {
		case <-ctx.Done():
			return last, fault.Unavailablef("the lab is not whole: logs are in %s", filepath.Join(l.dir, "log"))
		case <-time.After(100 * time.Millisecond):
		}
	}
}
