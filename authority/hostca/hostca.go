// Package hostca keeps what a host needs to issue certificates for its containers: an intermediate and its key, which never leaves the host, and the
// roots that containers trust.
//
// It asks the controller for an intermediate, replaces it at half of its life, at once when a container has an address that it does not cover, and
// goes on with what it has, across restarts too, while the controller is away. It ends no TLS and knows no containers (tlsproxy).
//
// Use: i, err := hostca.Open(cfg); run i.Run as a task; i.Leaf for each container, again at authority.Renewal and whenever Changed is closed.
package hostca

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/authority/authorityhttp"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/reconcile"
)

const (
	rootsEvery  = time.Hour        // how often it is asked which roots are trusted
	namesEvery  = time.Hour        // how often at most an intermediate is replaced because it does not permit a name
	vainEvery   = 30 * time.Second // from an answer that did not bring what a container needs to the next question for one
	maxNeeded   = 64               // addresses that are remembered until then
	lookEvery   = time.Minute      // between two looks at what is due
	firstRetry  = 2 * time.Second  // after a question that failed; doubled while the controller is away
	longestHold = 30 * time.Second // for which nobody's need brings the next one forward
	afterAnswer = time.Second      // from one answer to the next question that somebody waits for
)

// Config is what an Issuer works with. All of it is required.
type Config struct {
	// Dir is the directory of what outlives a restart, made if missing. intermediate.json in it holds the key and is readable to its owner
	// alone. roots/roots.pem is for containers: mount the directory roots into them, not the file, which is replaced when it changes. One Issuer has it at
	// a time, which is for the caller to see to: another would remove what this one is writing, and replace its intermediate.
	Dir string

	Underlay netip.Addr // of the host
	Client   *authorityhttp.Client
	Log      *slog.Logger
}

// RootsFile is the path, below Config.Dir, of the roots that containers trust.
const RootsFile = "roots/roots.pem"

// Issuer issues leaves. It is safe for concurrent use.
type Issuer struct {
	cfg   Config
	files files
	loop  *reconcile.Loop

	mu      sync.Mutex
	now     *authority.Intermediate // nil: none yet
	got     time.Time               // when now was given, or read from the state
	fresh   bool                    // it was given to this process
	roots   authority.Bundle
	heard   time.Time     // when the controller last said which roots are trusted
	wanted  bool          // somebody needs another intermediate
	needed  []netip.Addr  // for these, the last ones that were told
	inVain  bool          // the last one that was given did not serve them
	begun   uint64        // questions for an intermediate
	ended   uint64        // of begun, those that are over
	err     error         // of the last one
	ending  time.Time     // when that was over
	away    int           // questions without an answer, since the last one that had one
	leaves  uint64        // issued
	over    chan struct{} // closed at the end of each question
	changed chan struct{} // closed when now or roots change
}

// Open reads what an earlier process left in the directory. What is torn or makes no sense is set aside and told of in the log; what cannot be read stays. The error says that
// there can be no directory; the Issuer works without one, and tries again, if only writing fails.
func Open(cfg Config) (*Issuer, error) {
	f, err := openFiles(cfg.Dir)
	if err != nil {
		return nil, err
	}
	i := &Issuer{cfg: cfg, files: f, over: make(chan struct{}), changed: make(chan struct{})}
	i.loop = &reconcile.Loop{Name: "host-ca", Step: i.pass, Log: cfg.Log, Resync: lookEvery, MinGap: afterAnswer, Retry: firstRetry}
	s, err := f.load()
	switch {
	case err != nil:
		cfg.Log.Warn("saved intermediate cannot be used", "error", err)
	case s.intermediate == nil:
	case s.underlay != cfg.Underlay:
		cfg.Log.Info("saved intermediate is of another host", "underlay", s.underlay, "own", cfg.Underlay)
	default:
		i.now, i.roots, i.got = s.intermediate, s.roots, time.Now()
		cfg.Log.Info("saved intermediate read", "expires", i.now.Certificate().NotAfter, "subnets", i.now.Constraints().Subnets)
	}
	return i, nil
}

// Run keeps the intermediate and the roots until ctx ends, then returns nil. It must be called once.
func (i *Issuer) Run(ctx context.Context) error { return i.loop.Run(ctx) }

// Leaf issues a leaf for a container. Without an intermediate that covers its addresses and has not expired it asks for one and waits until ctx
// ends or that question is over; the error then says why there is none. Names that the intermediate does not permit are left out; it is asked, not oftener than
// hourly, whether they are permitted meanwhile.
func (i *Issuer) Leaf(ctx context.Context, s authority.Spec) (*authority.Leaf, error) {
	if err := s.Group.Validate(); err != nil {
		return nil, err
	}
	asked, after := false, uint64(0)
	for {
		l, err := i.try(s)
		if err == nil || fault.Of(err) == fault.Internal {
			return l, err
		}
		over, begun, ended, failed := i.progress()
		switch {
		case asked && ended > after:
			return nil, errors.Join(err, failed)
		case !asked && begun == ended: // none is under way, whose answer may be what is needed
			if !i.ask(s.Addresses) {
				return nil, errors.Join(err, failed) // it was said a moment ago what there is
			}
			asked, after = true, ended
		}
		select {
		case <-over:
		case <-ctx.Done():
			return nil, errors.Join(err, ctx.Err())
		}
	}
}

// try issues a leaf from what there is.
func (i *Issuer) try(s authority.Spec) (*authority.Leaf, error) {
	i.mu.Lock()
	now := i.now
	i.mu.Unlock()
	if now == nil {
		return nil, fault.Unavailablef("the controller has given no intermediate yet")
	}
	l, err := now.Leaf(s, time.Now())
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.leaves++
	if len(l.LeftOut) > 0 && !i.wanted && (!i.fresh || time.Since(i.got) >= namesEvery) {
		i.wanted = true
		i.loop.Kick()
	}
	return l, nil
}

func (i *Issuer) progress() (over chan struct{}, begun, ended uint64, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.over, i.begun, i.ended, i.err
}

// ask wants an intermediate for some addresses soon. It reports whether there will be a question now: not if the last one was in vain a moment ago, or failed; what
// failed is tried again by the loop in its own time. All hosts of a fleet may be in need when the controllers come back.
func (i *Issuer) ask(addrs []netip.Addr) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	hold := vainEvery
	switch {
	case i.err != nil:
		hold = min(firstRetry<<min(i.away, 8), longestHold)
	case !i.inVain:
		hold = 0
	}
	if time.Since(i.ending) < hold {
		return false
	}
	i.wanted = true
	if len(i.needed)+len(addrs) <= maxNeeded {
		i.needed = append(i.needed, addrs...)
	}
	i.loop.Kick()
	return true
}

// Need asks for another intermediate, without waiting, if there is none that covers a container's addresses. It reports whether there is one.
func (i *Issuer) Need(addrs ...netip.Addr) bool {
	i.mu.Lock()
	covered := i.now != nil && i.now.Covers(addrs...)
	i.mu.Unlock()
	if !covered {
		i.ask(addrs)
	}
	return covered
}

// Roots returns the roots that are trusted, the zero Bundle while none are known.
func (i *Issuer) Roots() authority.Bundle {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.roots
}

// TrustDomain returns the trust domain of the intermediate, "" while there is none.
func (i *Issuer) TrustDomain() authority.TrustDomain {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.now == nil {
		return ""
	}
	return i.now.Constraints().TrustDomain
}

// Changed returns a channel that is closed when the intermediate or the roots change next: leaves that do not verify any more, or lack names, are to be issued anew.
func (i *Issuer) Changed() <-chan struct{} {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.changed
}

// Status is how an Issuer fares.
type Status struct {
	Expires time.Time      // of the intermediate; zero: there is none
	Subnets []netip.Prefix // that it covers
	Leaves  uint64         // issued by this process
	Asked   uint64         // questions for an intermediate
	Err     error          // of the last pass; nil if all was well
}

// Status returns the current figures.
func (i *Issuer) Status() Status {
	i.mu.Lock()
	defer i.mu.Unlock()
	s := Status{Leaves: i.leaves, Asked: i.begun, Err: i.loop.Stats().LastError}
	if i.now != nil {
		s.Expires, s.Subnets = i.now.Certificate().NotAfter, slices.Clone(i.now.Constraints().Subnets)
	}
	return s
}
