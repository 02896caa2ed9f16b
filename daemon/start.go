package daemon

import (
	"fmt"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/lease"
)

// DeviceState is what the VTEP says about a lease. The zero value is no device.
type DeviceState struct {
	Exists bool
	Base   netip.Addr // first address of the subnet, from the MAC or the address; zero when neither tells
}

// Saved is what the state directory says about a lease. The zero value is nothing saved.
type Saved struct {
	Lease     lease.Lease // zero: none
	Confirmed time.Time   // last success by the wall clock; zero: unknown
	Refused   bool        // the controller refused to renew it; whether it is another's is not known
	Lost      bool        // the subnet is another's: it is not to be used while containers stand in it
}

// Containers is what is attached to the host.
type Containers struct {
	Live      int            // attachments that are alive
	Addresses []netip.Prefix // theirs, of one address each
	Stale     int            // entries of the deployed store that nothing on the host stands for
	Err       error          // a source could not be read: there may be more
}

// none reports whether there certainly is no container.
func (c Containers) none() bool { return c.Live == 0 && c.Err == nil }

// Found is what a starting daemon finds on the host.
type Found struct {
	Underlay   netip.Addr
	Overlay    netip.Prefix
	Bits       int // prefix length of a block lease
	Device     DeviceState
	Saved      Saved
	Containers Containers
	Age        Age // of Saved.Confirmed
}

// Age is how old the last confirmation of a lease is.
type Age uint8

// The ages.
const (
	AgeUnknown Age = iota // never recorded, or the clock went back since
	AgeValid              // the lease cannot have been given away: within the tolerance
	AgeExpired            // older
)

// AgeOf returns the age of a confirmation at time now.
func AgeOf(confirmed, now time.Time, tolerance time.Duration) Age {
	switch {
	case confirmed.IsZero() || now.Before(confirmed):
		return AgeUnknown
	case now.Sub(confirmed) < tolerance:
		return AgeValid
	}
	return AgeExpired
}

// Candidate returns the lease that the host seems to have, to be offered to the controller: the saved one if the device does
// not contradict it, else the one that the device stands for, else the one that the containers' addresses lie in.
// The zero Lease means that nothing on the host tells.
func (f Found) Candidate() lease.Lease {
	saved := f.Saved.Lease.Subnet
	switch {
	case saved.IsValid() && (!f.Device.Base.IsValid() || f.Device.Base == saved.Addr()):
		return f.leaseOf(saved)
	case f.Device.Base.IsValid():
		return f.leaseOf(f.block(f.Device.Base))
	case len(f.Containers.Addresses) > 0:
		s := f.block(f.Containers.Addresses[0].Addr())
		for _, a := range f.Containers.Addresses {
			if !s.Contains(a.Addr()) {
				return lease.Lease{}
			}
		}
		return f.leaseOf(s)
	}
	return lease.Lease{}
}

func (f Found) leaseOf(s netip.Prefix) lease.Lease {
	return lease.Lease{Underlay: f.Underlay, Subnet: s, MAC: lease.MACOf(s)}
}

// block returns the subnet that a pool could have given with a in it. The first block of an overlay is given as single
// addresses and never as a block.
func (f Found) block(a netip.Addr) netip.Prefix {
	s := netip.PrefixFrom(a, f.Bits).Masked()
	if s.Addr() == f.Overlay.Addr() {
		return netip.PrefixFrom(a, a.BitLen())
	}
	return s
}

// Answer is what the controller says to the renewal of a candidate.
type Answer uint8

// The answers. Every failure but a conflict, whether the controller is away, overloaded or broken, is worth a retry.
const (
	AnswerNone     Answer = iota // not asked
	AnswerRenewed                // the lease is this host's
	AnswerConflict               // the lease is lost for good
	AnswerFailed                 // no verdict
)

// Action is what a starting daemon does.
type Action uint8

// The actions.
const (
	ActionAsk     Action = iota // renew the candidate, then decide again
	ActionUse                   // come up on the candidate
	ActionDegrade               // come up on the candidate without the controller's word and go on asking
	ActionSuspend               // keep off the overlay until the controller confirms the candidate
	ActionRefused               // the same, and find out whether the candidate is another's
	ActionFence                 // keep off the overlay until the last container has gone
	ActionAcquire               // let go of what is there and take a new lease
	ActionExit                  // a person must look
)

// String returns the action's name.
func (a Action) String() string {
	return [...]string{"ask", "use", "degrade", "suspend", "refused", "fence", "acquire", "exit"}[a]
}

// Decision is an action with the reason for a person to read. With ActionExit the reason is the error text.
type Decision struct {
	Action Action
	Reason string
}

// Decide is the start-up table. It is called with AnswerNone first and, if that says ActionAsk, again with what the
// controller answered. Nothing that containers stand on is ever let go of; nothing is let go of before it is known that the
// controller answers, unless it is worthless.
func Decide(f Found, a Answer) Decision {
	c := f.Candidate()
	switch {
	case c == lease.Lease{} && f.Containers.none():
		return Decision{ActionAcquire, "this host has no lease yet"}
	case c == lease.Lease{} && f.Containers.Live == 0:
		return unreadable(f)
	case c == lease.Lease{}:
		return Decision{ActionExit, fmt.Sprintf("nothing tells which lease the containers on this host stand in: containers: %d", f.Containers.Live)}
	case !inside(f.Overlay, c.Subnet):
		return outside(f, c)
	case f.Saved.Lost && c.Subnet == f.Saved.Lease.Subnet:
		return lost(f, ActionFence, "the lease "+c.Subnet.String()+" was lost before the daemon started")
	}
	switch a {
	case AnswerNone:
		return Decision{ActionAsk, ""}
	case AnswerRenewed:
		return Decision{ActionUse, ""}
	case AnswerConflict:
		return lost(f, ActionRefused, "the controller refused to renew "+c.Subnet.String())
	}
	return unconfirmed(f, c)
}

// outside decides about a lease that is not in the overlay network.
func outside(f Found, c lease.Lease) Decision {
	switch {
	case f.Containers.Live > 0:
		return Decision{ActionExit, fmt.Sprintf("discovered lease is not in overlay network and has containers: %d (lease %v, overlay network %v): move the containers away first",
			f.Containers.Live, c.Subnet, f.Overlay)}
	case f.Containers.Err != nil:
		return unreadable(f)
	}
	return Decision{ActionAcquire, fmt.Sprintf("the lease %v is not in the overlay network %v", c.Subnet, f.Overlay)}
}

// lost decides about a lease that is not this host's any more: with containers it does keep.
func lost(f Found, keep Action, why string) Decision {
	if f.Containers.none() {
		return Decision{ActionAcquire, why}
	}
	return Decision{keep, why}
}

// unconfirmed decides when the controller gave no verdict.
func unconfirmed(f Found, c lease.Lease) Decision {
	saved := c == f.Saved.Lease // of this host: not of the one that an image was taken from
	switch {
	case saved && f.Saved.Refused && !f.Containers.none():
		return Decision{ActionSuspend, "the controller refused to renew the lease when it was last asked"}
	case saved && f.Saved.Refused:
		return Decision{ActionAcquire, "the controller refused to renew the lease when it was last asked"}
	case saved && f.Age == AgeValid:
		return Decision{ActionDegrade, "the controller did not confirm the lease: it was last confirmed " + f.Saved.Confirmed.UTC().Format(time.RFC3339)}
	case saved && f.Age == AgeUnknown:
		return Decision{ActionDegrade, "the controller did not confirm the lease, and the clock does not tell when it last did"}
	case saved && !f.Containers.none():
		return Decision{ActionSuspend, "the lease was last confirmed " + f.Saved.Confirmed.UTC().Format(time.RFC3339) + ", longer ago than partition_tolerance_seconds"}
	case !f.Containers.none():
		return Decision{ActionDegrade, "the controller did not confirm the lease that the device or the containers stand for, and no saved state tells when it last did"}
	}
	return Decision{ActionAcquire, "the lease " + c.Subnet.String() + " was not confirmed and nothing depends on it"}
}

// unreadable refuses to let go of anything while it is not known what stands on it.
func unreadable(f Found) Decision {
	return Decision{ActionExit, fmt.Sprintf("read datastore: %v", f.Containers.Err)}
}

// inside reports whether s is a true part of the overlay.
func inside(overlay, s netip.Prefix) bool {
	return s.IsValid() && s.Bits() > overlay.Bits() && overlay.Contains(s.Addr())
}
