package kernel_test

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"golang.org/x/sys/unix"
)

const testProtocol = 83

// upNS returns a namespace whose loopback interface is up.
func upNS(t *testing.T) *kernel.NS {
	t.Helper()
	ns := netns.New(t)
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(1, unix.IFF_UP, unix.IFF_UP))
	carryOut(t, ns, &b)
	return ns
}

func carryOut(t *testing.T, ns *kernel.NS, b *kernel.Batch) {
	t.Helper()
	if refused, err := dial(t, ns).Do(b); err != nil || len(refused) > 0 {
		t.Fatal(refused, err)
	}
}

// localRoutes returns the protocol numbers of the routes to addr in table local.
func localRoutes(t *testing.T, ns *kernel.NS, addr netip.Addr) (protocols []byte) {
	t.Helper()
	for p := range 256 {
		list, err := kernel.LocalAddrs(ns, uint8(p))
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(list, addr) {
			protocols = append(protocols, byte(p))
		}
	}
	return protocols
}

func TestLocalAddrs(t *testing.T) {
	ns := netns.New(t) // never had an address
	if list, err := kernel.LocalAddrs(ns, testProtocol); err != nil || len(list) > 0 {
		t.Errorf("an empty namespace has %v, %v", list, err)
	}
	ns = upNS(t)
	want := []netip.Addr{netip.MustParseAddr("169.254.0.2"), netip.MustParseAddr("169.254.0.3"), netip.MustParseAddr("fd00::2")}
	for i, a := range append(want, netip.MustParseAddr("169.254.0.4")) {
		if err := kernel.HoldLocal(ns, a, testProtocol+uint8(i/3)); err != nil {
			t.Fatal(err)
		}
	}
	list, err := kernel.LocalAddrs(ns, testProtocol)
	if slices.SortFunc(list, netip.Addr.Compare); err != nil || !slices.Equal(list, want) {
		t.Errorf("local are %v, %v, want %v", list, err, want)
	}
}

func TestHoldLocal(t *testing.T) {
	for _, addr := range []netip.Addr{netip.MustParseAddr("169.254.0.2"), netip.MustParseAddr("fd00::2")} {
		ns := upNS(t)
		before := localRoutes(t, ns, addr)
		for range 2 {
			if err := kernel.HoldLocal(ns, addr, testProtocol); err != nil {
				t.Fatal(err)
			}
		}
		if got := localRoutes(t, ns, addr); !slices.Equal(got, []byte{testProtocol}) {
			t.Errorf("%v: routes of protocols %v, want one of %d", addr, got, testProtocol)
		}
		if err := kernel.DropLocal(ns, addr, testProtocol+1); err != nil {
			t.Fatal(err)
		}
		if got := localRoutes(t, ns, addr); len(got) != 1 {
			t.Errorf("%v: dropping another's route left %v", addr, got)
		}
		for range 2 {
			if err := kernel.DropLocal(ns, addr, testProtocol); err != nil {
				t.Fatal(err)
			}
		}
		if got := localRoutes(t, ns, addr); !slices.Equal(got, before) {
			t.Errorf("%v: routes %v after the drop, %v before the hold", addr, got, before)
		}
	}
}

func TestHoldLocalLeavesWhatIsThere(t *testing.T) {
	addr := netip.MustParseAddr("169.254.0.2")
	ns := upNS(t)
	var b kernel.Batch
	b.Add(unix.RTM_NEWADDR, unix.NLM_F_CREATE, kernel.IfAddr(1, 32, unix.RT_SCOPE_HOST))
	b.Attr(unix.IFA_LOCAL, addr.AsSlice())
	carryOut(t, ns, &b)
	if err := kernel.HoldLocal(ns, addr, testProtocol); err != nil {
		t.Errorf("an address that somebody gave the loopback interface: %v", err)
	}
	if err := kernel.DropLocal(ns, addr, testProtocol); err != nil {
		t.Error(err)
	}
	if got := localRoutes(t, ns, addr); !slices.Equal(got, []byte{unix.RTPROT_KERNEL}) {
		t.Errorf("routes of protocols %v, want the kernel's", got)
	}

	ns = upNS(t)
	b.Reset()
	b.Add(unix.RTM_NEWROUTE, unix.NLM_F_CREATE, []byte{unix.AF_INET, 32, 0, 0, unix.RT_TABLE_LOCAL, unix.RTPROT_STATIC, 0, unix.RTN_BLACKHOLE, 0, 0, 0, 0})
	b.Attr(unix.RTA_DST, addr.AsSlice())
	carryOut(t, ns, &b)
	for _, none := range []netip.Addr{{}, netip.IPv4Unspecified(), netip.IPv6Unspecified()} { // which would be every address
		if err := kernel.HoldLocal(ns, none, testProtocol); !errors.Is(err, fault.Invalid) {
			t.Errorf("hold %v: %v, want fault.Invalid", none, err)
		}
	}
	if err := kernel.DropLocal(ns, netip.Addr{}, testProtocol); !errors.Is(err, fault.Invalid) {
		t.Errorf("drop no address: %v, want fault.Invalid", err)
	}
	if err := kernel.HoldLocal(ns, netip.MustParseAddr("::ffff:169.254.0.3"), testProtocol); err != nil {
		t.Error(err)
	}
	if list, err := kernel.LocalAddrs(ns, testProtocol); err != nil || !slices.Equal(list, []netip.Addr{netip.MustParseAddr("169.254.0.3")}) {
		t.Errorf("local are %v, %v", list, err)
	}
	if err := kernel.HoldLocal(ns, addr, testProtocol); !errors.Is(err, fault.Conflict) {
		t.Errorf("an address that somebody refuses: %v, want fault.Conflict", err)
	}
}

func TestSocketsOfAnotherNamespace(t *testing.T) {
	ns := netns.New(t)
	want, err := ns.ID()
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		fd, err := kernel.Socket(ns, unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		of, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
		if err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(of, &st); err != nil || (kernel.NSID{Dev: uint64(st.Dev), Ino: st.Ino}) != want {
			t.Errorf("socket of namespace %d, %v, want %v", st.Ino, err, want)
		}
		unix.Close(of)
		unix.Close(fd)
	}
	if id, err := kernel.CurrentID(); err != nil || id == want {
		t.Errorf("this thread is in %v, %v", id, err)
	}
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 2000 { // the runtime picks the thread
		fd, err := kernel.Socket(ns, unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
	}
	if after, err := os.Readlink("/proc/self/ns/net"); err != nil || after != before {
		t.Errorf("/proc/self/ns/net is %s, %v, was %s", after, err, before)
	}
}
