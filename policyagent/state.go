package policyagent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// The files of the state directory.
const (
	policiesFile = "policies.jsonl"
	lockFile     = "agent.lock"
	tempFile     = ".tmp-" // begins what a killed process was writing
)

// saved is what has to outlive a reboot: the last complete list of policies, and the tag of overlay ingress.
type saved struct {
	held   policy.HeldState
	router identity.Tag
}

// state is the directory of what is saved. The zero state is no directory: nothing is in it and nothing can be stored.
type state struct{ dir string }

var errNoState = errors.New("there is no state directory: see the log of the start")

// openState makes the directory if it is missing, removes what a killed process was still writing and takes the lock that keeps a second
// agent away; unlock lets it go.
func openState(ctx context.Context, dir string) (s state, unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return state{}, nil, fmt.Errorf("open state directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return state{}, nil, fmt.Errorf("open state directory: %w", err)
	}
	if err := kernel.Flock(ctx, f); err != nil {
		f.Close()
		return state{}, nil, fmt.Errorf("open state directory: is another vxlan-policy-agent running with it? %w", err)
	}
	left, _ := filepath.Glob(filepath.Join(dir, tempFile+"*")) // the pattern is good
	for _, l := range left {
		if err := os.Remove(l); err != nil {
			f.Close()
			return state{}, nil, fmt.Errorf("open state directory: %w", err)
		}
	}
	return state{dir}, f.Close, nil
}

// The file has one JSON object a line: the header, then the rules. The header's count and digest prove that they are all there.
type savedHeader struct {
	Revision revision.Revision `json:"revision"`
	Groups   []identity.Group  `json:"groups"`
	Router   identity.Tag      `json:"router,omitzero"`
	Count    int               `json:"count"`
	Sum      string            `json:"sum"`
}

type savedRule struct {
	Source         identity.Group  `json:"source"`
	SourceTag      identity.Tag    `json:"source_tag"`
	Destination    identity.Group  `json:"destination"`
	DestinationTag identity.Tag    `json:"destination_tag"`
	Protocol       policy.Protocol `json:"protocol"`
	Ports          string          `json:"ports"`
	Until          time.Time       `json:"until,omitzero"`
}

// load returns what was saved last; nothing is the zero value. A file that is not whole is an error.
func (s state) load() (saved, error) {
	if s.dir == "" {
		return saved{}, nil
	}
	f, err := os.Open(filepath.Join(s.dir, policiesFile))
	if errors.Is(err, fs.ErrNotExist) {
		return saved{}, nil
	}
	if err != nil {
		return saved{}, fmt.Errorf("read state: %w", err)
	}
	defer f.Close()
	v, err := parseSaved(f)
	if err != nil {
		return saved{}, fmt.Errorf("read state %s: %w", f.Name(), err)
	}
	return v, nil
}

// maxLine bounds a line of the state in bytes: the header lists the groups of a host, of which there are at most some thousands.
const maxLine = 16 << 20

// parseSaved reads what save writes.
func parseSaved(r io.Reader) (v saved, err error) {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, 64<<10), maxLine)
	var h savedHeader
	if !lines.Scan() {
		return saved{}, fault.Invalidf("no header: %w", errors.Join(lines.Err(), io.ErrUnexpectedEOF))
	}
	if err := json.Unmarshal(lines.Bytes(), &h); err != nil {
		return saved{}, fault.Invalidf("header: %w", err)
	}
	v = saved{policy.HeldState{Revision: h.Revision, Groups: h.Groups}, h.Router}
	names := map[identity.Group]identity.Group{} // each group's name is kept in memory once
	intern := func(g identity.Group) identity.Group {
		if one, ok := names[g]; ok {
			return one
		}
		names[g] = g
		return g
	}
	var sum policy.Digest
	for lines.Scan() {
		r, err := parseRule(lines.Bytes())
		if err != nil {
			return saved{}, fault.Invalidf("rule %d: %w", len(v.held.Rules)+1, err)
		}
		r.Source, r.Destination = intern(r.Source), intern(r.Destination)
		sum = sum.Add(r.Rule)
		v.held.Rules = append(v.held.Rules, r)
	}
	if err := lines.Err(); err != nil {
		return saved{}, err
	}
	if len(v.held.Rules) != h.Count || sum.String() != h.Sum {
		return saved{}, fault.Invalidf("%d rules with digest %v: expected %d with %.20s", len(v.held.Rules), sum, h.Count, h.Sum)
	}
	return v, nil
}

func parseRule(line []byte) (policy.HeldRule, error) {
	var r savedRule
	if err := json.Unmarshal(line, &r); err != nil {
		return policy.HeldRule{}, err
	}
	ports, err := policy.ParsePorts(r.Ports)
	if err != nil {
		return policy.HeldRule{}, err
	}
	return policy.HeldRule{
		Rule: policy.Rule{
			Policy:    policy.Policy{Source: r.Source, Destination: r.Destination, Protocol: r.Protocol, Ports: ports},
			SourceTag: r.SourceTag, DestinationTag: r.DestinationTag,
		},
		Until: r.Until,
	}, nil
}

// save replaces what is saved: a temporary file, its content on the disk, the new name, the directory on the disk. Only its owner can read it.
func (s state) save(v saved) error {
	if s.dir == "" {
		return errNoState
	}
	f, err := os.CreateTemp(s.dir, tempFile)
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	w := bufio.NewWriterSize(f, 64<<10)
	err = writeSaved(w, v)
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(s.dir, policiesFile))
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("write state: %w", err)
	}
	d, err := os.Open(s.dir)
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

func writeSaved(w io.Writer, v saved) error {
	h := savedHeader{v.held.Revision, v.held.Groups, v.router, len(v.held.Rules), ""}
	var sum policy.Digest
	for _, r := range v.held.Rules {
		sum = sum.Add(r.Rule)
	}
	h.Sum = sum.String()
	e := json.NewEncoder(w)
	if err := e.Encode(h); err != nil {
		return err
	}
	for _, r := range v.held.Rules {
		err := e.Encode(savedRule{r.Source, r.SourceTag, r.Destination, r.DestinationTag, r.Protocol, r.Ports.String(), r.Until})
		if err != nil {
			return err
		}
	}
	return nil
}
