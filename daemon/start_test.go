package daemon

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/lease"
)

var (
	underlay = netip.MustParseAddr("10.0.16.5")
	noon     = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
)

func mine(subnet string) lease.Lease {
	p := netip.MustParsePrefix(subnet)
	return lease.Lease{Underlay: underlay, Subnet: p, MAC: lease.MACOf(p)}
}

// found starts from a host with nothing on it.
func found(change ...func(*Found)) Found {
	f := Found{Underlay: underlay, Overlay: netip.MustParsePrefix("10.255.0.0/16"), Bits: 24}
	for _, c := range change {
		c(&f)
	}
	return f
}

func device(base string) func(*Found) {
	return func(f *Found) { f.Device = DeviceState{Exists: true, Base: netip.MustParseAddr(base)} }
}

func saved(subnet string, age Age) func(*Found) {
	return func(f *Found) { f.Saved = Saved{Lease: mine(subnet), Confirmed: noon}; f.Age = age }
}

func wasLost(f *Found) { f.Saved.Lost = true }

func ofAnotherHost(f *Found) { f.Saved.Lease.Underlay = f.Saved.Lease.Underlay.Next() }

func wasRefused(f *Found) { f.Saved.Refused = true }

func containers(addrs ...string) func(*Found) {
	return func(f *Found) {
		f.Containers.Live = len(addrs)
		for _, a := range addrs {
			f.Containers.Addresses = append(f.Containers.Addresses, netip.MustParsePrefix(a+"/32"))
		}
	}
}

func unreadableStore(f *Found) { f.Containers.Err = errors.New("store is not JSON") }

// TestDecide has one row for each case of the start-up table.
func TestDecide(t *testing.T) {
	const sub, base, c1 = "10.255.30.0/24", "10.255.30.0", "10.255.30.2"
	for _, c := range []struct {
		name   string
		found  Found
		answer Answer
		want   Action
		reason string // part of it
	}{
		{"nothing at all", found(), AnswerNone, ActionAcquire, "no lease yet"},
		{"nothing, store unreadable", found(unreadableStore), AnswerNone, ActionExit, "read datastore: store is not JSON"},
		{"device without a sign of its lease", found(func(f *Found) { f.Device.Exists = true }), AnswerNone, ActionAcquire, "no lease yet"},
		{"all state gone, containers in two blocks", found(containers(c1, "10.255.31.2")), AnswerNone, ActionExit, "containers: 2"},

		{"all state gone, containers in one block", found(containers(c1)), AnswerNone, ActionAsk, ""},
		{"all state gone, containers, renewed", found(containers(c1)), AnswerRenewed, ActionUse, ""},
		{"all state gone, containers, conflict", found(containers(c1)), AnswerConflict, ActionRefused, "refused"},
		{"all state gone, containers, no verdict", found(containers(c1)), AnswerFailed, ActionDegrade, "no saved state"},

		{"outside the overlay", found(device("10.254.3.0")), AnswerNone, ActionAcquire, "not in the overlay"},
		{"saved lease outside the overlay", found(saved("10.254.3.0/24", AgeValid)), AnswerNone, ActionAcquire, "not in the overlay"},
		{"outside, containers", found(device("10.254.3.0"), containers("10.254.3.2")), AnswerNone, ActionExit,
			"discovered lease is not in overlay network and has containers: 1"},
		{"outside, store unreadable", found(device("10.254.3.0"), unreadableStore), AnswerNone, ActionExit, "read datastore"},

		{"lost before", found(saved(sub, AgeValid), wasLost), AnswerNone, ActionAcquire, "was lost"},
		{"lost before, containers", found(saved(sub, AgeValid), wasLost, containers(c1)), AnswerNone, ActionFence, "was lost"},
		{"lost before, store unreadable", found(saved(sub, AgeValid), wasLost, unreadableStore), AnswerNone, ActionFence, "was lost"},
		{"lost before, device has another since", found(saved(sub, AgeValid), wasLost, device("10.255.9.0")), AnswerNone, ActionAsk, ""},

		{"device only", found(device(base)), AnswerNone, ActionAsk, ""},
		{"device only, renewed", found(device(base)), AnswerRenewed, ActionUse, ""},
		{"device only, conflict", found(device(base)), AnswerConflict, ActionAcquire, "refused"},
		{"device only, no verdict", found(device(base)), AnswerFailed, ActionAcquire, "nothing depends on it"},
		{"device only, containers, renewed", found(device(base), containers(c1)), AnswerRenewed, ActionUse, ""},
		{"device only, containers, conflict", found(device(base), containers(c1)), AnswerConflict, ActionRefused, "refused"},
		{"device only, containers, no verdict", found(device(base), containers(c1)), AnswerFailed, ActionDegrade, "no saved state"},
		{"device only, store unreadable, no verdict", found(device(base), unreadableStore), AnswerFailed, ActionDegrade, "no saved state"},
		{"device only, store unreadable, conflict", found(device(base), unreadableStore), AnswerConflict, ActionRefused, "refused"},

		{"saved", found(saved(sub, AgeValid)), AnswerNone, ActionAsk, ""},
		{"saved, renewed", found(saved(sub, AgeExpired), containers(c1)), AnswerRenewed, ActionUse, ""},
		{"saved, conflict", found(saved(sub, AgeValid), device(base)), AnswerConflict, ActionAcquire, "refused"},
		{"saved, conflict, containers", found(saved(sub, AgeValid), device(base), containers(c1)), AnswerConflict, ActionRefused, "refused"},
		{"reboot while the controller is away", found(saved(sub, AgeValid)), AnswerFailed, ActionDegrade, "last confirmed 2026-05-01T12:00:00Z"},
		{"restart while the controller is away", found(saved(sub, AgeValid), device(base), containers(c1)), AnswerFailed, ActionDegrade, "last confirmed"},
		{"clock went back", found(saved(sub, AgeUnknown), device(base), containers(c1)), AnswerFailed, ActionDegrade, "clock"},
		{"clock went back, no containers", found(saved(sub, AgeUnknown)), AnswerFailed, ActionDegrade, "clock"},
		{"state of the host that an image was taken from", found(saved(sub, AgeValid), ofAnotherHost), AnswerFailed, ActionAcquire, "nothing depends on it"},
		{"host with another address since, containers", found(saved(sub, AgeValid), ofAnotherHost, device(base), containers(c1)), AnswerFailed, ActionDegrade, "no saved state"},
		{"refused before", found(saved(sub, AgeValid), wasRefused), AnswerFailed, ActionAcquire, "refused"},
		{"refused before, containers", found(saved(sub, AgeValid), wasRefused, containers(c1)), AnswerFailed, ActionSuspend, "refused"},
		{"refused before, containers, renewed", found(saved(sub, AgeValid), wasRefused, containers(c1)), AnswerRenewed, ActionUse, ""},
		{"expired", found(saved(sub, AgeExpired), device(base)), AnswerFailed, ActionAcquire, "nothing depends on it"},
		{"expired, containers", found(saved(sub, AgeExpired), device(base), containers(c1)), AnswerFailed, ActionSuspend, "partition_tolerance_seconds"},
		{"expired, store unreadable", found(saved(sub, AgeExpired), unreadableStore), AnswerFailed, ActionSuspend, "partition_tolerance_seconds"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Decide(c.found, c.answer)
			if got.Action != c.want || !strings.Contains(got.Reason, c.reason) {
				t.Errorf("%v %q, want %v %q", got.Action, got.Reason, c.want, c.reason)
			}
		})
	}
}

// TestDecideNeverLetsGoOfContainers walks through every combination.
func TestDecideNeverLetsGoOfContainers(t *testing.T) {
	devices := []func(*Found){func(*Found) {}, func(f *Found) { f.Device.Exists = true }, device("10.255.30.0"), device("10.255.31.0"), device("10.254.1.0"), device("10.255.0.12")}
	states := []func(*Found){func(*Found) {}}
	for _, s := range []string{"10.255.30.0/24", "10.255.0.12/32", "10.254.1.0/24"} {
		for age := AgeUnknown; age <= AgeExpired; age++ {
			states = append(states, saved(s, age), func(f *Found) { saved(s, age)(f); wasLost(f) }, func(f *Found) { saved(s, age)(f); wasRefused(f) })
		}
	}
	n := 0
	for _, d := range devices {
		for _, s := range states {
			for _, c := range []func(*Found){containers("10.255.30.2"), containers("10.254.1.2"), containers("10.255.30.2", "10.255.77.3"), unreadableStore} {
				for a := AnswerNone; a <= AnswerFailed; a++ {
					f := found(d, s, c)
					got := Decide(f, a)
					n++
					if got.Action == ActionAcquire {
						t.Errorf("%+v with answer %d: %v", f, a, got)
					}
					if got.Action == ActionAsk && a != AnswerNone {
						t.Errorf("%+v with answer %d: asked again", f, a)
					}
					if a == AnswerConflict && (got.Action == ActionUse || got.Action == ActionDegrade) {
						t.Errorf("%+v: a lost lease is used", f)
					}
					if (f.Saved.Refused || f.Saved.Lost) && f.Candidate() == f.Saved.Lease && a != AnswerRenewed && (got.Action == ActionUse || got.Action == ActionDegrade) {
						t.Errorf("%+v with answer %d: a lease that was refused is used", f, a)
					}
					if (got.Action == ActionExit || got.Action == ActionFence) && got.Reason == "" {
						t.Errorf("%+v with answer %d: %v without a reason", f, a, got.Action)
					}
				}
			}
		}
	}
	if n < 1000 {
		t.Fatalf("only %d combinations", n)
	}
}

func TestCandidate(t *testing.T) {
	for _, c := range []struct {
		name  string
		found Found
		want  string
	}{
		{"nothing", found(), "invalid Prefix"},
		{"device tells a block", found(device("10.255.30.0")), "10.255.30.0/24"},
		{"device in the first block is one address", found(device("10.255.0.12")), "10.255.0.12/32"},
		{"last address of the first block", found(device("10.255.0.255")), "10.255.0.255/32"},
		{"saved keeps its length", found(saved("10.255.30.0/25", AgeValid), device("10.255.30.0")), "10.255.30.0/25"},
		{"single address after a restart", found(saved("10.255.0.12/32", AgeValid), device("10.255.0.12")), "10.255.0.12/32"},
		{"saved alone", found(saved("10.255.30.0/24", AgeExpired)), "10.255.30.0/24"},
		{"device wins over a state it contradicts", found(saved("10.255.30.0/24", AgeValid), device("10.255.31.0")), "10.255.31.0/24"},
		{"device without a sign", found(saved("10.255.30.0/24", AgeValid), func(f *Found) { f.Device.Exists = true }), "10.255.30.0/24"},
		{"containers tell", found(containers("10.255.30.7", "10.255.30.9")), "10.255.30.0/24"},
	} {
		got := c.found.Candidate()
		if got.Subnet.String() != c.want {
			t.Errorf("%s: %v, want %v", c.name, got.Subnet, c.want)
		}
		if got.Subnet.IsValid() && got.Validate() != nil {
			t.Errorf("%s: %v", c.name, got.Validate())
		}
	}
}

func TestAgeOf(t *testing.T) {
	for _, c := range []struct {
		since time.Duration
		want  Age
	}{{0, AgeValid}, {time.Hour - 1, AgeValid}, {time.Hour, AgeExpired}, {-1, AgeUnknown}} {
		if got := AgeOf(noon, noon.Add(c.since), time.Hour); got != c.want {
			t.Errorf("after %v: %v, want %v", c.since, got, c.want)
		}
	}
	if got := AgeOf(time.Time{}, noon, time.Hour); got != AgeUnknown {
		t.Errorf("never confirmed: %v", got)
	}
}
