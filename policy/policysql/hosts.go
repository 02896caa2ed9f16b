package policysql

import (
	"cmp"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

const (
	maxHosts   = 1 << 16         // that report to one store
	sweepEvery = 5 * time.Second // at most, when there are so many, hosts that report no more are looked for
	maxNames   = 100             // of hosts in a list
	forget     = 24 * time.Hour  // after which nothing is known any more of a host that does not report
	maxHost    = 255             // bytes of a host's name
)

// host is what is known of a host that reports here.
type host struct {
	name    string
	set     *set      // its groups; nil once it is silent
	inForce uint64    // counter of the revision in its kernel, 0 when that is not known
	at      time.Time // of its last report
	claimed bool      // other stores have been told that it reports here
}

// reports is what hosts reported to this store. It is guarded by feed.mu.
type reports struct {
	hosts    map[string]*host
	deployed time.Time     // when an agent of the deployed kind, or one that is not counted, asked last
	gone     []string      // hosts that were forgotten, of which other stores do not know yet
	swept    time.Time     // when hosts that report no more were last looked for
	kicks    chan struct{} // other stores should be told
}

func newReports() reports { return reports{hosts: map[string]*host{}, kicks: make(chan struct{}, 1)} }

func (r *reports) kick() {
	select {
	case r.kicks <- struct{}{}:
	default:
	}
}

// void forgets what is in force: the counters were those of another epoch.
func (r *reports) void() {
	for _, h := range r.hosts {
		h.inForce = 0
	}
}

// lags reports whether a change that touches the host's groups is not in its kernel.
func (h *host) lags() bool { return h.set != nil && h.inForce < h.set.last }

// report takes down what an agent says, whose groups are a set's. One for whom there is no room is served all the same, since whoever makes up names must not
// keep others from their policies, but counts as an agent that reports nothing: what is in force everywhere is not known then.
func (f *feed) report(a policy.Ask, s *set, lease time.Duration) {
	if a.Host == "" {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.hosts.hosts[a.Host]
	news := h == nil
	if news {
		if len(f.hosts.hosts) >= maxHosts && !f.sweep(lease) {
			f.reportsNothing(time.Now())
			return
		}
		h = &host{name: a.Host}
		f.hosts.hosts[a.Host] = h
	}
	lagged := h.lags()
	if h.set != s {
		s.users++
		if h.set != nil {
			f.leave(h.set)
		}
		h.set, news = s, true
	}
	h.at, h.inForce = time.Now(), 0
	if a.InForce.Epoch == f.at.head.Epoch {
		h.inForce = a.InForce.Counter
	}
	if news || lagged != h.lags() || h.lags() && h.inForce > 0 {
		f.move()
	}
}

// sweep forgets hosts that report no more, and reports whether there was any. The caller holds mu.
func (f *feed) sweep(lease time.Duration) bool {
	if time.Since(f.hosts.swept) < sweepEvery {
		return false
	}
	f.hosts.swept = time.Now()
	for _, h := range f.hosts.hosts {
		if time.Since(h.at) > lease {
			f.yield(h)
			f.hosts.gone = append(f.hosts.gone, h.name)
		}
	}
	return len(f.hosts.hosts) < maxHosts
}

// reportsNothing notes that an agent asked for policies at a time which does not say what it has in force. The caller holds mu.
func (f *feed) reportsNothing(at time.Time) {
	if at.Sub(f.hosts.deployed) >= beatEvery {
		f.hosts.kick()
	}
	if at.After(f.hosts.deployed) {
		f.hosts.deployed = at
	}
}

// yield forgets a host that reports to another store.
func (f *feed) yield(h *host) {
	if h.set != nil {
		f.leave(h.set)
		h.set = nil
	}
	delete(f.hosts.hosts, h.name)
}

// late is a host that does not have everything in force.
type late struct {
	Host    string
	Counter uint64 // up to which it has every change that touches it
}

// summary is what hosts that report here have in force.
type summary struct {
	epoch     string
	seen, low uint64
	reporting int
	silent    int
	behind    int
	lagging   []late // the first of them, by counter
	deployed  time.Time
}

// equal reports whether two summaries say the same to other stores.
func (a summary) equal(b summary) bool {
	return a.epoch == b.epoch && a.seen == b.seen && a.low == b.low && a.reporting == b.reporting && a.silent == b.silent && a.behind == b.behind &&
		slices.Equal(a.lagging, b.lagging) && b.deployed.Sub(a.deployed) < beatEvery
}

// summary counts hosts. Of those that lag only such matter that have less than a counter and one of groups in common, unless groups is nil.
func (f *feed) summary(lease time.Duration, below uint64, groups []identity.Group) summary {
	f.mu.Lock()
	defer f.mu.Unlock()
	var concerned map[*set]bool
	if groups != nil {
		concerned = map[*set]bool{}
		for _, g := range groups {
			if t := f.topics[g]; t != nil {
				for _, s := range t.sets {
					concerned[s] = true
				}
			}
		}
	}
	head := f.at.head
	sum := summary{epoch: head.Epoch, seen: head.Counter, low: head.Counter, deployed: f.hosts.deployed}
	for name, h := range f.hosts.hosts {
		age := time.Since(h.at)
		if age > lease {
			if h.set != nil {
				f.leave(h.set)
				h.set = nil
			}
			if age > forget {
				delete(f.hosts.hosts, name)
				f.hosts.gone = append(f.hosts.gone, name)
				continue
			}
			sum.silent++
			continue
		}
		sum.reporting++
		if !h.lags() || groups != nil && !concerned[h.set] {
			continue
		}
		if has := h.set.reach(h.inForce); has < below {
			sum.low = min(sum.low, has)
			sum.lagging = append(sum.lagging, late{h.name, has})
		}
	}
	sum.behind = len(sum.lagging)
	slices.SortFunc(sum.lagging, func(a, b late) int { return cmp.Or(cmp.Compare(a.Counter, b.Counter), cmp.Compare(a.Host, b.Host)) })
	sum.lagging = slices.Clone(sum.lagging[:min(maxNames, len(sum.lagging))])
	return sum
}
