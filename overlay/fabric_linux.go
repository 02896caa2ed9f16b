package overlay

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease"
	"golang.org/x/sys/unix"
)

// Fabric is the overlay of one network namespace. Its methods are safe for concurrent use; Set, Plan, Remove and
// CheckHost take turns. There should be one Fabric for a namespace.
//
// A Set looks at everything, unless it can know that nothing was touched: the Fabric has been subscribed to the
// kernel's notifications since before the last whole look, that look found everything right, and no notification about
// what it looks after has come since, but for those that answer the Fabric's own requests. Then only the difference
// between the peers of then and now is sent. Lost notifications count as a change. The rule is still "compare with the
// kernel": a Fabric that is not certain looks.
type Fabric struct {
	ns     *kernel.NS
	ownsNS bool
	view   atomic.Pointer[view] // what Watch needs to tell what concerns it
	ears   ears

	mu     sync.Mutex
	rt, nf *kernel.Conn
	rtPort uint32
	nfPort uint32
	heard  *listeners
	known  *known // nil: the kernel must be looked at
}

// known is a state that the kernel was seen to be in, or was brought to from there undisturbed.
type known struct {
	wish   wish
	device Device
	counts counts
}

// view says which objects in the kernel a Set looks after.
type view struct {
	device   string
	index    int // of the device, 0 when there is none
	lower    int // index of the lower device, 0 when there is none
	lowerBy  string
	underlay netip.Addr
	peers    []lease.Lease
}

// Open prepares to work in ns, nil for the calling thread's namespace. It changes nothing. ns must stay open until Close.
func Open(ns *kernel.NS) (*Fabric, error) {
	f := &Fabric{ns: ns}
	err := f.open()
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (f *Fabric) open() (err error) {
	if f.ns == nil {
		if f.ns, err = kernel.CurrentNS(); err != nil {
			return err
		}
		f.ownsNS = true
	}
	if f.rt, err = kernel.Dial(f.ns); err != nil {
		return err
	}
	if f.rtPort, err = f.rt.Port(); err != nil {
		return err
	}
	if f.nf, err = kernel.DialNetfilter(f.ns); err != nil {
		return err
	}
	if f.nfPort, err = f.nf.Port(); err != nil {
		return err
	}
	if f.heard, err = listen(f.ns); err == nil {
		f.ears.add(f.heard)
	}
	return err
}

// Close lets go of the connections to the kernel. What was set stays. No other method may be running or be called later.
func (f *Fabric) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	if f.heard != nil {
		errs = append(errs, f.heard.close())
	}
	for _, c := range []*kernel.Conn{f.rt, f.nf} {
		if c != nil {
			errs = append(errs, c.Close())
		}
	}
	if f.ownsNS {
		errs = append(errs, f.ns.Close())
	}
	return errors.Join(errs...)
}

// Set makes the kernel agree with cfg and reports what it found and did. One refused request does not stop the others:
// then the report counts it and the error says which. An observation that is not complete plans nothing and is an error.
// fault.Conflict: the device's name or UDP port is taken by something that is not ours. fault.Unavailable: there is
// no lower device to make the VTEP on.
func (f *Fabric) Set(ctx context.Context, cfg Config) (Report, error) {
	if err := cfg.Validate(); err != nil {
		return Report{}, err
	}
	w := newWish(cfg)
	f.mu.Lock()
	defer f.mu.Unlock()
	if r, ok := f.setDelta(ctx, &w); ok {
		return r, nil
	}
	r, again, err := f.setFull(ctx, &w)
	if again { // somebody changed the guard between look and deed: look again, once
		r, _, err = f.setFull(ctx, &w)
	}
	return r, err
}

// Plan returns what a Set that looks at everything would do, as the commands an operator would type, and changes nothing.
func (f *Fabric) Plan(ctx context.Context, cfg Config) ([]string, Report, error) {
	if err := cfg.Validate(); err != nil {
		return nil, Report{}, err
	}
	w := newWish(cfg)
	f.mu.Lock()
	defer f.mu.Unlock()
	o, err := f.observe(ctx, &w)
	if err != nil {
		return nil, Report{}, err
	}
	p, err := makePlan(&w, o)
	if err != nil {
		return nil, Report{}, err
	}
	r := w.report(p)
	r.Full = true
	return p.explain(), r, nil
}

func (w *wish) report(p *plan) Report {
	return Report{Desired: p.desired, Observed: p.observed, Foreign: p.foreign, NonRoutable: w.nonRoutable, Skipped: w.skipped}
}

// setDelta sends the difference to what is known. It is not ok when nothing is known any more.
func (f *Fabric) setDelta(ctx context.Context, w *wish) (Report, bool) {
	k := f.known
	if k == nil || !k.wish.sameBase(w) || f.heard.poll(f.view.Load(), nil) {
		f.known = nil
		return Report{}, false
	}
	p := planDelta(w, k.wish.peers, k.counts)
	r := w.report(p)
	r.Device = k.device
	f.known = nil
	if !p.empty() {
		f.look(&view{w.cfg.Device, k.device.Index, f.view.Load().lower, w.cfg.Lower, w.cfg.Underlay, w.peers})
		a := applier{f: f, ctx: ctx, index: k.device.Index}
		a.apply(p)
		if a.failed > 0 || a.err != nil {
			return Report{}, false
		}
		r.Changed = a.changed
		if f.heard.poll(f.view.Load(), f.explains(p)) {
			return r, true // done, but somebody else changed something too
		}
	}
	f.known = &known{wish: *w, device: k.device, counts: counts{desired: p.desired, foreign: p.foreign}}
	return r, true
}

// look says what is looked after from here on. It reports whether something of it may have been missed until now.
func (f *Fabric) look(v *view) (missed bool) {
	f.view.Store(v)
	return f.ears.set(v)
}

// Forget makes the next Set look at everything. A caller does so at long intervals, in case that something changes
// without the kernel telling.
func (f *Fabric) Forget() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known = nil
}

// setFull looks at everything and sends the difference. Again is true if another attempt is likely to do better.
func (f *Fabric) setFull(ctx context.Context, w *wish) (r Report, again bool, err error) {
	f.known = nil
	f.heard.poll(nil, nil) // what changed before the look is in it
	v := view{device: w.cfg.Device, lowerBy: w.cfg.Lower, underlay: w.cfg.Underlay, peers: w.peers}
	if f.view.Load() == nil {
		first := v
		f.look(&first) // whatever goes wrong now, Watch knows what may mend it
	}
	o, err := f.observe(ctx, w)
	if err != nil {
		return Report{}, false, err
	}
	if v.lower = o.lower.index; o.link != nil {
		v.index = o.link.index
	}
	missed := f.look(&v)
	p, err := makePlan(w, o)
	if err != nil {
		return w.report(&plan{counts: counts{foreign: o.foreign}}), false, err
	}
	r = w.report(p)
	r.Full = true
	r.Device = Device{v.index, p.link.want.mtu, o.lower.name}
	if p.empty() {
		if !f.heard.poll(&v, nil) && o.lower.index != 0 && !missed {
			f.known = &known{wish: *w, device: r.Device, counts: p.counts}
		}
		return r, false, f.noLower(w, o)
	}
	a := applier{f: f, ctx: ctx, index: v.index, guard: guardRules(w.cfg, o.lower.name)}
	a.apply(p)
	r.Changed, r.Failed, r.Device.Index = a.changed, a.failed, a.index
	if a.index != v.index {
		moved := v
		moved.index = a.index
		f.look(&moved) // a view that others may be reading never changes
	}
	return r, a.again, errors.Join(a.error(), f.noLower(w, o))
}

// noLower is the error of a device that goes on without its lower device.
func (f *Fabric) noLower(w *wish, o *observed) error {
	if o.lower.index != 0 {
		return nil
	}
	return fault.Unavailablef("device %s cannot send: no interface has the underlay address %v%s", w.cfg.Device, w.cfg.Underlay, lowerHint(w.cfg))
}

// explains returns what tells whether a notification is the echo of p.
func (f *Fabric) explains(p *plan) func(bool, kernel.Message) bool {
	type echo struct {
		typ   uint16
		entry entry
	}
	entries, gone := map[echo]bool{}, map[netip.Addr]bool{}
	for _, e := range p.putEntries {
		entries[echo{unix.RTM_NEWNEIGH, e}] = true
	}
	for _, e := range p.delEntries {
		entries[echo{unix.RTM_DELNEIGH, e}] = true
	}
	for _, n := range p.delNeighs {
		gone[n.addr] = true
	}
	return func(nf bool, m kernel.Message) bool {
		switch {
		case nf:
			return m.Port == f.nfPort
		case m.Port == f.rtPort:
			return true
		case m.Type != unix.RTM_NEWNEIGH && m.Type != unix.RTM_DELNEIGH:
			return false
		}
		// The kernel does not say who changed a forwarding entry, nor who removed a neighbour. What undoes ours is not ours.
		if _, e, ok := parseEntry(m.Body); ok {
			return entries[echo{m.Type, e}]
		}
		_, n, ok := parseNeigh(m.Body)
		return ok && m.Type == unix.RTM_DELNEIGH && gone[n.addr]
	}
}
