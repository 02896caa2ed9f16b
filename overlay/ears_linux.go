package overlay

import (
	"sync"

	"code.cloudfoundry.org/silk/internal/kernel"
)

// ears are the listeners that are open. While a view is known that has no transient device in it, which is always but for devices
// that somebody numbered by hand, the kernel keeps from them what is about such devices: containers come and go without waking
// anybody here. What is kept back would not concern that view (view.concerns): a device of another number becomes one of it only after a
// change to one of its own, which is heard.
type ears struct {
	mu     sync.Mutex
	all    map[*listeners]bool
	sieved bool
}

// add begins to look after l.
func (e *ears) add(l *listeners) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.all == nil {
		e.all = map[*listeners]bool{}
	}
	e.all[l] = true
	if e.sieved {
		l.sieve(true)
	}
}

// remove ends that.
func (e *ears) remove(l *listeners) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.all, l)
}

// set makes the listeners hear what v needs. It reports whether they did not until now.
func (e *ears) set(v *view) (missed bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	want := v.index != 0 && v.lower != 0 && !kernel.IsTransient(v.index) && !kernel.IsTransient(v.lower)
	if want == e.sieved {
		return false
	}
	e.sieved = want
	for l := range e.all {
		l.sieve(want)
	}
	return !want
}

// sieve has the kernel keep back what is about transient devices, or not. Where it cannot, they are only heard in vain; a listener that
// is closed hears nothing anyway.
func (l *listeners) sieve(on bool) {
	if on {
		l.rt.Sieve(Protocol)
	} else {
		l.rt.Unsieve()
	}
}
