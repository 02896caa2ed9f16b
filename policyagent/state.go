package policyagent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/durable"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// The files of the state directory.
const (
	policiesFile = "policies.jsonl"
	lockFile     = "agent.lock"
)

// saved is what has to outlive a reboot: the last complete list of policies, and the tag of overlay ingress.
type saved struct {
	held   policy.HeldState
	router identity.Tag
}

// state is the directory of what is saved. The zero state is no directory: nothing is in it and nothing can be stored. It is not safe for
// concurrent use.
type state struct {
	dir  string
	last *stored // what the file has, nil if it is not known or cannot be added to
}

// stored is what was written into the file, in this life.
type stored struct {
	saved
	sum         policy.Digest
	whole, more int64 // bytes: of the list, and of the changes after it
}

var errNoState = errors.New("there is no state directory: see the log of the start")

// openState makes the directory if it is missing, removes what a killed process was still writing and takes the lock that keeps a second
// agent away; unlock lets it go.
func openState(ctx context.Context, dir string) (s *state, unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("open state directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("open state directory: %w", err)
	}
	if err := kernel.Flock(ctx, f); err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("open state directory: is another vxlan-policy-agent running with it? %w", err)
	}
	if err := durable.Sweep(dir); err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("open state directory: %w", err)
	}
	return &state{dir: dir}, f.Close, nil
}

// The file has one JSON object a line: the header, then the rules, then changes. The header's count and digest prove that the rules are all there,
// those of a change that they are all there after it. A change whose line has no end was being written when the agent was killed: it did not take place.
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

// savedChange is what a list that follows differs in. Groups and router are those of the header.
type savedChange struct {
	Revision revision.Revision `json:"revision"`
	Gone     []savedRule       `json:"gone,omitempty"`
	Set      []savedRule       `json:"set,omitempty"`
	Count    int               `json:"count"`
	Sum      string            `json:"sum"`
}

// load returns what was saved last; nothing is the zero value. A file that is not whole is an error.
func (s *state) load() (saved, error) {
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
	lines.Split(scanWithEnd)
	var h savedHeader
	if !lines.Scan() {
		return saved{}, fault.Invalidf("no header: %w", errors.Join(lines.Err(), io.ErrUnexpectedEOF))
	}
	if err := json.Unmarshal(lines.Bytes(), &h); err != nil {
		return saved{}, fault.Invalidf("header: %w", err)
	}
	v = saved{policy.HeldState{Revision: h.Revision, Groups: h.Groups}, h.Router}
	names := names{}
	var sum policy.Digest
	n := 0
	for ; n < h.Count && lines.Scan(); n++ {
		var line savedRule
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return saved{}, fault.Invalidf("rule %d: %w", n+1, err)
		}
		r, err := names.rule(line)
		if err != nil {
			return saved{}, fault.Invalidf("rule %d: %w", n+1, err)
		}
		sum = sum.Add(r)
		if line.Until.IsZero() {
			v.held.Listed = append(v.held.Listed, r)
		} else {
			v.held.Absent = append(v.held.Absent, policy.HeldRule{Rule: r, Until: line.Until})
		}
	}
	if err := lines.Err(); err != nil {
		return saved{}, err
	}
	if n != h.Count || sum.String() != h.Sum {
		return saved{}, fault.Invalidf("%d rules with digest %v: expected %d with %.20s", n, sum, h.Count, h.Sum)
	}
	if err := parseChanges(lines, names, &v); err != nil {
		return saved{}, err
	}
	return v, lines.Err()
}

// scanWithEnd is bufio.ScanLines that leaves the end of a line, which tells whether it is whole.
func scanWithEnd(data []byte, atEOF bool) (int, []byte, error) {
	if i := bytes.IndexByte(data, '\n'); i >= 0 {
		return i + 1, data[:i+1], nil
	}
	if atEOF && len(data) > 0 {
		return len(data), data, nil
	}
	return 0, nil, nil
}

// parseChanges makes v what it is after the changes that follow the list.
func parseChanges(lines *bufio.Scanner, names names, v *saved) error {
	all := map[policy.Policy]policy.Rule{} // the zero rule: gone
	var last savedChange
	n := 0
	for ; lines.Scan() && bytes.HasSuffix(lines.Bytes(), []byte("\n")); n++ {
		var c savedChange
		err := json.Unmarshal(lines.Bytes(), &c)
		for i := 0; i < len(c.Gone)+len(c.Set) && err == nil; i++ {
			var r policy.Rule
			if i < len(c.Gone) {
				r, err = names.rule(c.Gone[i])
				all[r.Policy] = policy.Rule{}
			} else {
				r, err = names.rule(c.Set[i-len(c.Gone)])
				all[r.Policy] = r
			}
		}
		if err != nil {
			return fault.Invalidf("change %d: %w", n+1, err)
		}
		last = c
	}
	if n == 0 {
		return nil
	}
	sum, err := strconv.ParseUint(last.Sum, 16, 64)
	if err != nil || len(v.held.Absent) > 0 {
		return fault.Invalidf("change %d: digest %.20q, %d rules that no list has", n, last.Sum, len(v.held.Absent))
	}
	u := policy.Update{Revision: last.Revision, Count: last.Count, Sum: policy.Digest(sum)}
	for p, r := range all {
		if r == (policy.Rule{}) {
			u.Gone = append(u.Gone, p)
		} else {
			u.Set = append(u.Set, r)
		}
	}
	v.held.Revision = last.Revision
	v.held.Listed, err = u.Apply(v.held.Listed)
	return err
}

// names keeps each group's name in memory once.
type names map[identity.Group]identity.Group

func (n names) one(g identity.Group) identity.Group {
	if one, ok := n[g]; ok {
		return one
	}
	n[g] = g
	return g
}

func (n names) rule(r savedRule) (policy.Rule, error) {
	ports, err := policy.ParsePorts(r.Ports)
	p := policy.Policy{Source: n.one(r.Source), Destination: n.one(r.Destination), Protocol: r.Protocol, Ports: ports}
	return policy.Rule{Policy: p, SourceTag: r.SourceTag, DestinationTag: r.DestinationTag}, err
}

// How many changed rules are added to the file at once, and how many bytes of them follow the list: a share of the list, and some more.
const (
	fewChanged   = 4096
	changesShare = 4
	changesFloor = 64 << 10
)

// save stores v: by a line at the end of the file if little has changed since the last time, or the whole of it.
func (s *state) save(v saved) error {
	if s.dir == "" {
		return errNoState
	}
	if c, ok := s.change(v); ok && s.add(c) == nil {
		s.last.saved = v
		return nil
	}
	s.last = nil // what failed may be there in part
	size, sum, err := s.replace(v)
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	s.last = &stored{saved: v, sum: sum, whole: size}
	return nil
}

// change returns in what v differs from what the file has. It is not ok if the file has to be written anew.
func (s *state) change(v saved) (c savedChange, ok bool) {
	l := s.last
	if l == nil || l.more > l.whole/changesShare+changesFloor || len(v.held.Absent)+len(l.held.Absent) > 0 || v.router != l.router ||
		!slices.Equal(v.held.Groups, l.held.Groups) {
		return c, false
	}
	set, gone := policy.Differences(v.held.Listed, l.held.Listed)
	if len(set)+len(gone) > fewChanged {
		return c, false
	}
	sum := l.sum
	for _, r := range gone {
		sum = sum.Remove(r)
		c.Gone = append(c.Gone, savedRuleOf(r, time.Time{}))
	}
	for _, r := range set {
		sum = sum.Add(r)
		c.Set = append(c.Set, savedRuleOf(r, time.Time{}))
	}
	c.Revision, c.Count, c.Sum = v.held.Revision, len(v.held.Listed), sum.String()
	l.sum = sum
	return c, true
}

// add appends a change to the file, if that is as long as it was left.
func (s *state) add(c savedChange) error {
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(s.dir, policiesFile), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || st.Size() != s.last.whole+s.last.more {
		return errors.Join(err, errors.New("somebody else has written it"))
	}
	n, err := f.Write(append(b, '\n'))
	s.last.more += int64(n)
	return errors.Join(err, f.Sync())
}

// replace writes the whole file. Only its owner can read it.
func (s *state) replace(v saved) (size int64, sum policy.Digest, err error) {
	err = durable.Replace(filepath.Join(s.dir, policiesFile), 0o600, func(f io.Writer) error {
		w := bufio.NewWriterSize(f, 64<<10)
		if sum, err = writeSaved(w, v); err == nil {
			err = w.Flush()
		}
		return err
	})
	if err != nil {
		return 0, 0, err
	}
	st, err := os.Stat(filepath.Join(s.dir, policiesFile))
	if err != nil {
		return 0, 0, err
	}
	return st.Size(), sum, nil
}

func savedRuleOf(r policy.Rule, until time.Time) savedRule {
	return savedRule{r.Source, r.SourceTag, r.Destination, r.DestinationTag, r.Protocol, r.Ports.String(), until}
}

// writeSaved writes a whole file and returns the digest in it.
func writeSaved(w io.Writer, v saved) (policy.Digest, error) {
	sum := policy.Sum(v.held.Listed)
	for _, r := range v.held.Absent {
		sum = sum.Add(r.Rule)
	}
	e := json.NewEncoder(w)
	if err := e.Encode(savedHeader{v.held.Revision, v.held.Groups, v.router, len(v.held.Listed) + len(v.held.Absent), sum.String()}); err != nil {
		return 0, err
	}
	for _, r := range v.held.Listed {
		if err := e.Encode(savedRuleOf(r, time.Time{})); err != nil {
			return 0, err
		}
	}
	for _, r := range v.held.Absent {
		if err := e.Encode(savedRuleOf(r.Rule, r.Until)); err != nil {
			return 0, err
		}
	}
	return sum, nil
}
