package policyagent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/durable"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/secgroup"
)

// groups is what the agent knows of security groups.
type groups struct {
	held    *secgroup.Held
	known   bool     // there was a list, now or in an earlier life
	version uint64   // changes with what is enforced
	spaces  []string // of containers here; nil until they are known
	members []identity.Group
	stale   chan struct{} // closed when the question that is under way is not the right one any more
	nudged  chan struct{} // ends a pause between questions
	news    bool          // the last answer was of another revision than the one before, or to another question
	dirty   bool          // there is something to be stored
	err     error         // of the last attempt to hear
	fails   uint64
}

const (
	groupsStart = 10 * time.Second // how long the rules of an earlier agent stay while no groups are known
	groupsFile  = "security-groups.json"

	newsGap = 20 * time.Millisecond // between questions when every answer is news: servers of two databases would keep this host busy
)

// update takes in an answer and reports whether what is enforced changes.
func (g *groups) update(u secgroup.Update, ask secgroup.Ask, now time.Time) (changed bool, err error) {
	held := g.held.Absent()
	was, had := g.held.Keep(now), g.held.State()
	expired := g.held.Absent() != held // by time: no list below shows it, and no later Keep
	if err := g.held.Update(u, ask, now); err != nil {
		if expired { // the next pass is told, whatever becomes of the answer
			g.version++
			g.dirty = true
		}
		return expired, err
	}
	changed = expired || !g.known || !slices.EqualFunc(was, g.held.Keep(now), secgroup.Record.Equal)
	asked := !slices.Equal(had.Spaces, ask.Spaces) || !slices.Equal(had.Members, ask.Members)
	g.dirty = g.dirty || changed || asked
	g.news = changed || asked || u.Revision != had.Revision
	if g.known = true; changed {
		g.version++
	}
	return changed, nil
}

// keep returns the groups to enforce, and whether they are others than before because some have been held for long enough.
func (g *groups) keep(now time.Time) (records []secgroup.Record, changed bool) {
	n := g.held.Absent()
	records = g.held.Keep(now)
	if changed = g.held.Absent() != n; changed {
		g.version++
		g.dirty = true
	}
	return records, changed
}

// covers reports whether the list is complete for a container.
func (g *groups) covers(c container) bool {
	l, _ := readLabels(c.metadata)
	of := g.held.State()
	space := l.space == "" || !bindable(l.space) || slices.Contains(of.Spaces, l.space)
	member := c.group().Validate() != nil || slices.Contains(of.Members, c.group())
	return g.known && space && member
}

// dynamic reports whether containers reach what security groups say.
func (a *agent) dynamic() bool { return a.cfg.ASGSyncing && a.groupFeed != nil }

// askGroups makes the spaces and members those to be asked for. mu is held.
func (a *agent) askGroups(h hosted) {
	if !a.dynamic() {
		return
	}
	g := &a.groups
	spaces, members := h.bindings()
	if g.spaces != nil && slices.Equal(spaces, g.spaces) && slices.Equal(members, g.members) {
		return
	}
	g.spaces, g.members = spaces, members
	if g.stale != nil {
		close(g.stale)
		g.stale = nil
	}
	a.wake()
}

// groupsKnown reports whether the security groups of a container are known. While they are not it sees to it that they are asked for. mu is held.
func (a *agent) groupsKnown(c container) bool {
	if !a.dynamic() || a.groups.covers(c) {
		return true
	}
	nudge(a.groups.nudged)
	return false
}

// hearingGroups learns of security groups until ctx ends.
func (a *agent) hearingGroups(ctx context.Context) error {
	failures := 0
	for {
		if !a.await(ctx, func() bool { return a.groups.spaces != nil }) {
			return nil
		}
		a.mu.Lock()
		g := &a.groups
		ask := g.held.Ask(a.cfg.name(), g.spaces, g.members)
		g.stale = make(chan struct{})
		stale := g.stale
		a.mu.Unlock()
		asked := time.Now()
		err := a.hearGroups(ctx, ask, stale)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && closed(stale) {
			continue // the question was given up
		}
		a.noteGroups(err)
		var pause time.Duration
		switch {
		case err != nil:
			failures++
			pause = reconcile.Backoff(hearFirst, hearLongest, failures)
			a.log.Warn("security groups could not be heard", "error", err, "retry_in", pause)
		case a.heardNews():
			failures, pause = 0, newsGap-time.Since(asked)
		default:
			failures, pause = 0, hearGap-time.Since(asked)
		}
		rest(ctx, pause, stale, a.groups.nudged)
	}
}

// heardNews reports whether the last answer was one to be told at once: to another question, or of another revision.
func (a *agent) heardNews() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.groups.news
}

// hearGroups asks until there is an answer or the question is stale, and takes it in.
func (a *agent) hearGroups(ctx context.Context, ask secgroup.Ask, stale <-chan struct{}) error {
	u, err := whileFresh(ctx, a.groupFeed.Watch, ask, stale)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	changed, err := a.groups.update(u, ask, wall())
	if err != nil {
		return err
	}
	if changed {
		a.noteChange()
		a.log.Debug("security groups changed", "revision", u.Revision, "groups", u.Count, "held", a.groups.held.Absent())
	}
	if a.groups.dirty {
		a.save.Kick()
	}
	return nil
}

// noteGroups notes how an attempt to hear ended.
func (a *agent) noteGroups(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.groups.err = err; err != nil {
		a.groups.fails++
	}
	a.wake()
}

// unheardGroups says why security groups are not known.
func (a *agent) unheardGroups() error {
	if a.groups.err != nil {
		return fault.Unavailablef("its security groups are not known: policy-server: %w", a.groups.err)
	}
	return fault.Unavailablef("its security groups are not known yet")
}

// groupTroubles words what is not as it should be. mu is held.
func (a *agent) groupTroubles() (r []string) {
	g := &a.groups
	if !g.known {
		r = append(r, "security groups: none are known: containers reach nothing outside the overlay")
	}
	if g.err != nil {
		r = append(r, fmt.Sprintf("security groups: %v", g.err))
	}
	if n := g.held.Absent(); n > 0 {
		r = append(r, fmt.Sprintf("security groups: %d are kept though the last list does not have them as they are", n))
	}
	return r
}

// storedGroups is the file. Its digest proves that the lists are whole.
type storedGroups struct {
	secgroup.HeldState
	Sum string
}

// loadGroups returns what was saved last; nothing is nil. A file that is not whole is an error.
func (s *state) loadGroups() (*secgroup.HeldState, error) {
	if s.dir == "" {
		return nil, nil
	}
	b, err := os.ReadFile(filepath.Join(s.dir, groupsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	h, err := parseGroups(b)
	if err != nil {
		return nil, fmt.Errorf("read state %s: %w", groupsFile, err)
	}
	return h, nil
}

// parseGroups reads what saveGroups writes.
func parseGroups(b []byte) (*secgroup.HeldState, error) {
	var f storedGroups
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, fault.Invalidf("%w", err)
	}
	if sum := sumOf(f.HeldState); sum != f.Sum {
		return nil, fault.Invalidf("digest %s: expected %.40s", sum, f.Sum)
	}
	return &f.HeldState, nil
}

func sumOf(h secgroup.HeldState) string {
	var absent []secgroup.Record
	for _, r := range h.Absent {
		absent = append(absent, r.Record)
	}
	return secgroup.Sum(h.Listed).String() + secgroup.Sum(absent).String()
}

// saveGroups stores what is known of security groups.
func (s *state) saveGroups(h secgroup.HeldState) error {
	if s.dir == "" {
		return errNoState
	}
	b, err := json.Marshal(storedGroups{h, sumOf(h)})
	if err == nil {
		err = durable.Replace(filepath.Join(s.dir, groupsFile), 0o600, func(w io.Writer) error {
			_, err := w.Write(append(b, '\n'))
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// writeGroups stores what is known of security groups, if it is another than was stored last.
func (a *agent) writeGroups() error {
	a.mu.Lock()
	g := &a.groups
	if !g.known || !g.dirty {
		a.mu.Unlock()
		return nil
	}
	g.dirty = false
	h := g.held.State()
	a.mu.Unlock()
	err := a.state.saveGroups(h)
	if err != nil {
		a.mu.Lock()
		a.groups.dirty = true
		a.mu.Unlock()
	}
	return err
}
