package tlsproxy

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
)

const (
	passGap    = 5 * time.Millisecond
	passRetry  = 200 * time.Millisecond
	passResync = time.Second     // ports that do not listen are tried again, and namespaces looked for
	readAgain  = 5 * time.Second // between two looks at all records when nobody calls for one
	soon       = 50 * time.Millisecond
	retries    = 10 // how often a port is tried soon after its container came: its address comes a moment after its device
)

// pass is what one pass over the containers leaves for the next.
type pass struct {
	called  atomic.Bool // somebody says that containers have changed
	read    time.Time   // when the records were last read
	records []endpoint.Record
	hurry   int // passes that are still to come soon
}

// watch calls for passes when containers come and go, until ctx ends.
func (p *proxy) watch(ctx context.Context) {
	for failures := 1; ctx.Err() == nil; failures++ {
		err := endpoint.Watch(ctx, p.ns, func() {
			p.seen.called.Store(true)
			p.follow.Kick()
		})
		if ctx.Err() != nil {
			return
		}
		pause := reconcile.Backoff(time.Second, time.Minute, failures)
		p.log.Error("watch on container devices ended", "error", err, "retry_in", pause)
		reconcile.Sleep(ctx, pause)
	}
}

// pass makes the ports agree with the records. Only the loop calls it.
func (p *proxy) pass(ctx context.Context) error {
	v := &p.seen
	called := v.called.Swap(false)
	if called || time.Since(v.read) >= readAgain {
		if err := p.read(); err != nil {
			v.called.Store(called)
			return err
		}
		if called {
			v.hurry = retries
		}
	}
	p.removeGone(time.Since(v.read) < passResync)
	all := true
	for _, r := range v.records {
		if ctx.Err() != nil {
			return nil
		}
		all = p.serveContainer(ctx, r) && all
	}
	if !all && v.hurry > 0 {
		v.hurry--
		time.AfterFunc(soon, p.follow.Kick)
	}
	return nil
}

// read finds the containers that want ports.
func (p *proxy) read() error {
	records, bad, err := p.dir.List()
	if err != nil {
		return err
	}
	devices, err := endpoint.Containers(p.ns) // after the records: one whose device is missing is going
	if err != nil {
		return err
	}
	there := map[string]bool{}
	for _, d := range devices {
		there[d.Device] = true
	}
	// A disk that fails for a moment is no reason to end a container's connections.
	for _, r := range p.seen.records {
		if slices.ContainsFunc(bad, func(b endpoint.Bad) bool { return b.Key == r.Key && slices.Contains(b.Addresses, r.Address()) }) {
			records = append(records, r)
		}
	}
	records = slices.DeleteFunc(records, func(r endpoint.Record) bool { return len(r.TLS) == 0 || !there[r.Device] })
	p.mu.Lock()
	if p.bad != len(bad) {
		for _, b := range bad {
			p.log.Warn("record of an endpoint cannot be read: ports that it wanted before stay", "file", b.File, "error", b.Err)
		}
	}
	p.bad = len(bad)
	p.mu.Unlock()
	p.seen.records, p.seen.read = records, time.Now()
	p.certificates.keep(records)
	return nil
}

// removeGone closes what no container wants any more, or what belongs to one that has ended without a word: our sockets are then all that keeps its
// namespace.
func (p *proxy) removeGone(thorough bool) {
	wanted := map[endpoint.Key]endpoint.Record{}
	for _, r := range p.seen.records {
		wanted[r.Key] = r
	}
	p.mu.Lock()
	var gone, stay []*site
	for k, s := range p.sites {
		if r, ok := wanted[k]; !ok || differ(r, s.record) {
			gone = append(gone, s)
		} else {
			stay = append(stay, s)
		}
	}
	for k := range p.failures {
		if _, ok := wanted[k]; !ok {
			delete(p.failures, k)
		}
	}
	p.mu.Unlock()
	for _, s := range stay {
		if !p.lives(s, thorough) {
			gone = append(gone, s)
		}
	}
	for _, s := range gone {
		s.close()
		p.mu.Lock()
		delete(p.sites, s.record.Key)
		for _, port := range s.ports {
			port.stats.add(&p.gone) // at once, for sums must not fall
		}
		p.mu.Unlock()
		p.log.Info("ports closed", "endpoint", s.record.Key, "address", s.record.Address())
	}
}

// differ reports whether a container's ports must be made anew.
func differ(a, b endpoint.Record) bool {
	return a.Namespace != b.Namespace || a.Device != b.Device || a.Group != b.Group || !slices.Equal(a.Addresses, b.Addresses) ||
		!slices.EqualFunc(a.TLS, b.TLS, func(x, y endpoint.TLSListener) bool {
			return x.Listen == y.Listen && x.Forward == y.Forward && x.ClientAuth == y.ClientAuth && slices.Equal(x.ALPN, y.ALPN)
		})
}

// lives reports whether the namespace of a container has a name or a process, beside our sockets in it. Looking for a process takes a look at all of
// them, so it is done when the name has just gone, and now and then.
func (p *proxy) lives(s *site, thorough bool) bool {
	named := false
	if info, err := os.Stat(s.record.Path); err == nil {
		st, ok := info.Sys().(*syscall.Stat_t)
		named = ok && (kernel.NSID{Dev: uint64(st.Dev), Ino: st.Ino}) == s.record.Namespace
	}
	thorough = thorough || s.named
	s.named = named
	if named || !thorough {
		return true
	}
	ns, err := p.openNamespace(s.record)
	if err != nil {
		return !errors.Is(err, fault.NotFound)
	}
	ns.Close()
	return true
}

// openNamespace opens a container's namespace.
func (p *proxy) openNamespace(r endpoint.Record) (ns *kernel.NS, err error) {
	if p.ns == nil {
		return endpoint.OpenNamespace(r)
	}
	err = p.ns.Do(func() error {
		ns, err = endpoint.OpenNamespace(r)
		return err
	})
	return ns, err
}

// serveContainer makes the ports of a container listen. It reports whether all do.
func (p *proxy) serveContainer(ctx context.Context, r endpoint.Record) bool {
	p.mu.Lock()
	s, failed := p.sites[r.Key], p.failures[r.Key]
	p.mu.Unlock()
	if s != nil {
		return s.listen(ctx)
	}
	s, err := openSite(p, r)
	p.mu.Lock()
	if err != nil {
		p.failures[r.Key] = err
		p.mu.Unlock()
		if failed == nil || failed.Error() != err.Error() {
			p.log.Warn("ports of a container cannot be made", "endpoint", r.Key, "error", err)
		}
		return false
	}
	delete(p.failures, r.Key)
	p.sites[r.Key] = s
	p.mu.Unlock()
	all := s.listen(ctx)
	p.log.Info("ports opened", "endpoint", r.Key, "address", r.Address(), "listening", s.listening(), "of", len(s.ports))
	return all
}
