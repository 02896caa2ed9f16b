// Package follow keeps policy-server's security groups those of Cloud Controller. Of all policy-servers on a database one does, by a lease
// in that database; when it ends or is cut off, another one takes over as soon as the lease has passed.
//
// It replaces nothing unless Cloud Controller has shown a list that adds up and did not change while it was read. Whatever goes wrong, what
// is known stays, and it is tried again. It does not know how Cloud Controller is asked (cc) nor how groups are kept (policysql).
//
// Use: s := follow.New(source, store, options, log); s.Run(ctx) as a task; s.Status() for metrics.
package follow

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policyserver/cc"
)

// Source is Cloud Controller: *cc.Client has both, for its two APIs.
type Source struct {
	Stamp func(ctx context.Context) (string, error) // when groups changed last; "": it does not say
	List  func(ctx context.Context) (cc.Groups, error)
}

// Options are what a Syncer does not need to be told. Zero values mean the defaults.
type Options struct {
	Name    string        // of this server, for people
	Every   time.Duration // between two looks at the stamp; default 1 s
	Blind   time.Duration // between two lists of a Cloud Controller that has no stamp; default 60 s
	Refresh time.Duration // after which the list is read though the stamp is the same, because not every change moves it; default 5 min
	Settle  time.Duration // after which a list that was new is read once more, because a stamp may show before what it stands for; default 5 s
	Lease   time.Duration // for which this server stays the one that follows; default 8 s
	MaxWait time.Duration // between two tries after errors, which begins with Every and doubles; default 15 s
	Brake   time.Duration // for which a list must lack much before what it lacks is removed; default 10 min
	Limit   time.Duration // of one pass; default 2 min
}

// Syncer follows Cloud Controller.
type Syncer struct {
	source Source
	store  func() *policysql.SecurityGroups
	o      Options
	log    *slog.Logger
	holder string

	// Of the goroutine of Run.
	due     time.Time // when the list is to be read at the latest
	checked bool      // the pass has found out that what is kept is what Cloud Controller shows
	reasons string    // that were logged
	lacking time.Time // since when lists lack much; zero: they do not

	mu     sync.Mutex
	status Status
}

// Status is how it goes.
type Status struct {
	Active   bool      // this server follows
	Last     time.Time // when it last knew that what is kept is what Cloud Controller shows; zero: never
	Passes   int       // while active, without an error
	Failed   int       // passes with one
	Lists    int       // read
	Replaced int       // lists that made a difference
	Unread   int       // groups and rules of the last list that cannot be understood
	Held     int       // groups that the last list lacks, and that are kept for a while because they are so many
	Err      error     // of the last pass
}

// New returns a Syncer. store returns nil while there is none yet.
func New(source Source, store func() *policysql.SecurityGroups, o Options, log *slog.Logger) *Syncer {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&o.Every, time.Second}, {&o.Blind, time.Minute}, {&o.Refresh, 5 * time.Minute}, {&o.Settle, 5 * time.Second}, {&o.Lease, 8 * time.Second}, {&o.MaxWait, 15 * time.Second},
		{&o.Brake, 10 * time.Minute}, {&o.Limit, 2 * time.Minute},
	} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
	var b [8]byte
	rand.Read(b[:]) // never fails
	if len(o.Name) > 40 {
		o.Name = o.Name[:40]
	}
	return &Syncer{source: source, store: store, o: o, log: log, holder: o.Name + "." + hex.EncodeToString(b[:])}
}

// Status returns how it goes.
func (s *Syncer) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// Run follows until ctx ends, then returns nil.
func (s *Syncer) Run(ctx context.Context) error {
	defer s.letGo(ctx)
	for failures := 0; ; {
		err := s.pass(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.note(err)
		wait := s.o.Every
		if failures++; err == nil {
			failures = 0
		}
		for n := 1; n < failures && wait < s.o.MaxWait; n++ {
			wait *= 2
		}
		wait = min(wait, max(s.o.MaxWait, s.o.Every))
		t := time.NewTimer(wait*3/4 + mrand.N(wait/4+1))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

// letGo ends the lease, so that another server takes over at once.
func (s *Syncer) letGo(ctx context.Context) {
	store := s.store()
	if store == nil { // who is not active may have the lease all the same, when the last question for it was cut off
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := store.LetGo(ctx, s.holder); err != nil {
		s.log.Warn("the lease of who follows cloud controller was not given back: it ends by itself", "error", err, "after", s.o.Lease)
	}
}

// note takes down how a pass went, and logs when that is news.
func (s *Syncer) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.status.Err
	s.status.Err = err
	switch {
	case err != nil:
		s.status.Failed++
		if was == nil {
			s.log.Warn("security groups of cloud controller were not read: what is known stays, and it is tried again", "error", err)
		}
	case s.status.Active:
		s.status.Passes++
		if s.checked {
			s.status.Last = time.Now()
		}
		if was != nil {
			s.log.Info("security groups of cloud controller were read again")
		}
	}
}

func (s *Syncer) setActive(active bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status.Active != active {
		s.log.Info(map[bool]string{true: "this server follows cloud controller's security groups", false: "another server follows cloud controller's security groups"}[active])
	}
	s.status.Active = active
}

// pass looks once, if this server is the one that does.
func (s *Syncer) pass(ctx context.Context) error {
	store := s.store()
	if s.checked = false; store == nil {
		return nil // not connected yet
	}
	ctx, cancel := context.WithTimeout(ctx, s.o.Limit)
	defer cancel()
	active, err := s.hold(ctx, store)
	if err != nil || !active {
		s.setActive(false)
		return err
	}
	s.setActive(true)
	stamp, err := s.source.Stamp(ctx)
	if err != nil {
		return err
	}
	known, err := store.Stamp(ctx)
	if err != nil {
		return fmt.Errorf("read what is known of cloud controller: %w", err)
	}
	if time.Now().Before(s.due) && (stamp == known || stamp == "") {
		s.checked = stamp != ""
		return nil
	}
	ctx, lost := s.keep(ctx, store)
	err = errors.Join(s.replace(ctx, store, stamp, known), lost())
	if errors.Is(err, fault.Denied) {
		s.setActive(false)
	}
	return err
}

func (s *Syncer) hold(ctx context.Context, store *policysql.SecurityGroups) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.Lease/2)
	defer cancel()
	return store.Hold(ctx, s.holder, s.o.Lease)
}

// keep renews the lease while a list is read. When that fails the context it returns ends. end waits until nothing goes on any more, and
// says what failed.
func (s *Syncer) keep(ctx context.Context, store *policysql.SecurityGroups) (during context.Context, end func() error) {
	during, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		every := time.NewTicker(s.o.Lease / 4)
		defer every.Stop()
		for {
			select {
			case <-during.Done():
				done <- nil
				return
			case <-every.C:
			}
			ok, err := s.hold(during, store)
			if err == nil && ok {
				continue
			}
			if during.Err() != nil {
				err = nil
			} else if err == nil {
				err = fault.Deniedf("another policy-server follows cloud controller by now")
			}
			cancel()
			done <- err
			return
		}
	}()
	return during, func() error {
		cancel()
		return <-done
	}
}

// replace reads the list and stores it, if the stamp was the same before and after.
func (s *Syncer) replace(ctx context.Context, store *policysql.SecurityGroups, stamp, known string) error {
	all, err := s.list(ctx, stamp)
	if err != nil {
		return err
	}
	held, err := s.brake(ctx, store, all)
	if err != nil {
		return err
	}
	all.Unread = append(all.Unread, held...)
	did, err := store.Replace(ctx, policysql.Replacement{Groups: all.Records, Keep: all.Unread, Stamp: stamp, Holder: s.holder})
	if err != nil {
		return err
	}
	s.checked = true
	now, changes := time.Now(), did.Added+did.Changed+did.Removed
	s.due = now.Add(s.o.Refresh - s.o.Refresh/10 + mrand.N(s.o.Refresh/5+1))
	if stamp == "" {
		s.due = now.Add(s.o.Blind)
	}
	if stamp != known {
		s.due = now.Add(min(s.o.Settle, s.o.Refresh))
	}
	if len(held) > 0 {
		s.due = now.Add(min(s.o.Refresh, s.o.Brake/10))
	}
	s.tell(all)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.Lists++
	s.status.Unread, s.status.Held = len(all.Reasons), len(held)
	if changes > 0 {
		s.status.Replaced++
		s.log.Info("security groups follow cloud controller", "added", did.Added, "changed", did.Changed, "removed", did.Removed, "all", len(all.Records), "revision", did.Revision.String())
	}
	return nil
}

// brake returns the groups that a list lacks when they are more than a quarter of more than eight, until lists have lacked so many for a
// while: to a client that has lost an authority Cloud Controller shows, without any error, the few groups that everybody may see.
func (s *Syncer) brake(ctx context.Context, store *policysql.SecurityGroups, all cc.Groups) ([]string, error) {
	known, err := store.List(ctx)
	if err != nil {
		return nil, err
	}
	there := make(map[string]bool, len(all.Records)+len(all.Unread))
	for _, r := range all.Records {
		there[r.GUID] = true
	}
	for _, guid := range all.Unread {
		there[guid] = true
	}
	var missing []string
	following := 0
	for _, k := range known {
		if !k.CloudController {
			continue
		}
		if following++; !there[k.GUID] {
			missing = append(missing, k.GUID)
		}
	}
	now := time.Now()
	switch {
	case following <= 8 || 4*len(missing) <= following:
		s.lacking = time.Time{}
		return nil, nil
	case s.lacking.IsZero():
		s.lacking = now
		s.log.Warn("cloud controller shows much fewer security groups than before: those that are missing stay for a while", "missing", len(missing), "of", following, "for", s.o.Brake,
			"remedy", "if they are not gone: does the client in uaa_client have the authority cloud_controller.admin_read_only?")
	case now.Sub(s.lacking) >= s.o.Brake:
		s.lacking = time.Time{}
		return nil, nil
	}
	return missing, nil
}

// list reads all groups of the moment of a stamp. Of a Cloud Controller that has no stamp the list counts when it is the same twice.
func (s *Syncer) list(ctx context.Context, stamp string) (cc.Groups, error) {
	all, err := s.source.List(ctx)
	if err != nil {
		return all, err
	}
	if stamp == "" {
		again, err := s.source.List(ctx)
		if err == nil && !same(all, again) {
			err = fault.Unavailablef("security groups changed while they were read")
		}
		return again, err
	}
	after, err := s.source.Stamp(ctx)
	if err == nil && after != stamp {
		err = fault.Unavailablef("security groups changed while they were read: at %s, before at %s", after, stamp)
	}
	return all, err
}

func same(a, b cc.Groups) bool {
	if len(a.Records) != len(b.Records) || len(a.Unread) != len(b.Unread) {
		return false
	}
	for i := range a.Records {
		if !a.Records[i].Equal(b.Records[i]) {
			return false
		}
	}
	return true
}

// maxReasons bounds what is logged at once.
const maxReasons = 20

// tell logs what was left out of a list, when that is not what was left out of the last one.
func (s *Syncer) tell(all cc.Groups) {
	text := fmt.Sprint(all.Reasons)
	if text == s.reasons {
		return
	}
	if s.reasons = text; len(all.Reasons) > 0 {
		s.log.Warn("rules of cloud controller's security groups cannot be enforced: agents leave them out", "count", len(all.Reasons), "first", all.Reasons[:min(len(all.Reasons), maxReasons)])
	}
}
