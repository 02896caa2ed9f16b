// Package registrationtest holds what everyone that finds the addresses of a name must do, as tests to run against one: a table, or the
// client of a server with a table behind it.
//
// Use: registrationtest.Run(t, func(t testing.TB, table *registration.Table, warm func() bool) registrationtest.Resolve {...}).
package registrationtest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
)

// Resolve is what is tested: registrationhttp.Resolve.
type Resolve = func(ctx context.Context, name string) ([]netip.Addr, error)

// Open returns a Resolve over a table that is warm when warm says so. It ends with the test.
type Open func(t testing.TB, table *registration.Table, warm func() bool) Resolve

func yes() bool { return true }

func register(table *registration.Table, name, address string, index int) {
	table.Register(registration.Registration{Name: registration.Name(name), Address: netip.MustParseAddr(address), Index: index})
}

// Run tests what open returns.
func Run(t *testing.T, open Open) {
	t.Run("Names", func(t *testing.T) { testNames(t, open) })
	t.Run("Changes", func(t *testing.T) { testChanges(t, open) })
	t.Run("ColdSaysNothing", func(t *testing.T) { testCold(t, open) })
	t.Run("ManyAtOnce", func(t *testing.T) { testMany(t, open) })
	t.Run("AnswersAreTheCallers", func(t *testing.T) { testCallersOwn(t, open) })
	t.Run("ManyAddresses", func(t *testing.T) { testLarge(t, open) })
}

func addresses(t *testing.T, r Resolve, name string) string {
	t.Helper()
	addrs, err := r(t.Context(), name)
	if err != nil {
		t.Fatalf("%q: %v", name, err)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return strings.Trim(fmt.Sprint(addrs), "[]")
}

func testNames(t *testing.T, open Open) {
	table := registration.NewTable()
	register(table, "api.apps.internal", "10.255.0.1", 0)
	register(table, "api.apps.internal", "10.255.0.2", 1)
	register(table, "six.apps.internal", "fd00::6", -1)
	register(table, "*.web.apps.internal", "10.255.0.4", -1)
	r := open(t, table, yes)
	for name, want := range map[string]string{
		"api.apps.internal": "10.255.0.1 10.255.0.2", "API.Apps.Internal": "10.255.0.1 10.255.0.2", "api.apps.internal.": "10.255.0.1 10.255.0.2",
		"1.api.apps.internal": "10.255.0.2", "2.api.apps.internal": "", "a.web.apps.internal": "10.255.0.4", "six.apps.internal": "fd00::6",
		"apps.internal": "", "none.apps.internal": "", "": "", ".": "", "..": "", "a..b": "", "api.apps.internal..": "",
		"api.apps.internal?x=1": "", "x/api.apps.internal": "", "../api.apps.internal": "", "%61pi.apps.internal": "", `a"b`: "", "é.apps.internal": "",
		"api.apps.internal\x00": "", " api.apps.internal": "", "api.apps.internal#": "", strings.Repeat("a", 3000): "",
	} {
		if got := addresses(t, r, name); got != want {
			t.Errorf("%.80q: %s, want %s", name, got, want)
		}
	}
}

func testChanges(t *testing.T, open Open) {
	table := registration.NewTable()
	r := open(t, table, yes)
	if got := addresses(t, r, "a"); got != "" {
		t.Errorf("before it is registered: %s", got)
	}
	register(table, "a", "10.255.0.1", -1)
	if got := addresses(t, r, "a"); got != "10.255.0.1" {
		t.Errorf("after it is registered: %s", got)
	}
	table.Unregister("a", netip.MustParseAddr("10.255.0.1"))
	if got := addresses(t, r, "a"); got != "" {
		t.Errorf("after it is gone: %s", got)
	}
}

func testCold(t *testing.T, open Open) {
	table := registration.NewTable()
	var warm atomic.Bool
	register(table, "a", "10.255.0.1", -1)
	r := open(t, table, warm.Load)
	for _, name := range []string{"a", "b"} {
		if addrs, err := r(t.Context(), name); !errors.Is(err, fault.Unavailable) || addrs != nil {
			t.Errorf("%s: %v, %v, want unavailable", name, addrs, err)
		}
	}
	warm.Store(true)
	if got := addresses(t, r, "a"); got != "10.255.0.1" {
		t.Errorf("once it is warm: %s", got)
	}
}

func testMany(t *testing.T, open Open) {
	table := registration.NewTable()
	register(table, "a", "10.255.0.1", -1)
	r := open(t, table, yes)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			for range 20 {
				if addrs, err := r(t.Context(), "a"); err != nil || len(addrs) != 1 {
					t.Errorf("%v, %v", addrs, err)
				}
			}
		})
	}
	all.Wait()
}

// testCallersOwn: what one caller does with an answer is nothing to the next.
func testCallersOwn(t *testing.T, open Open) {
	table := registration.NewTable()
	for i := range 4 {
		register(table, "a", netip.AddrFrom4([4]byte{10, 255, 0, byte(i)}).String(), -1)
	}
	r := open(t, table, yes)
	addrs, err := r(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	clear(addrs)
	if got := addresses(t, r, "a"); got != "10.255.0.0 10.255.0.1 10.255.0.2 10.255.0.3" {
		t.Errorf("addresses %s", got)
	}
}

func testLarge(t *testing.T, open Open) {
	table := registration.NewTable()
	for i := range 4000 {
		register(table, "a", netip.AddrFrom4([4]byte{10, 255, byte(i >> 8), byte(i)}).String(), -1)
	}
	if addrs, err := open(t, table, yes)(t.Context(), "a"); err != nil || len(addrs) != 4000 {
		t.Errorf("%d addresses, %v, want 4000", len(addrs), err)
	}
}
