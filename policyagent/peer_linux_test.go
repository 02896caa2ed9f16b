package policyagent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/kernel/tcp"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/overlay"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

func (r *running) peers() *policyhttp.PeerClient {
	c := policyhttp.NewPeerClient(uint16(r.cfg.DebugPort), 5*time.Second)
	r.t.Cleanup(c.Close)
	return c
}

// accepting accepts connections in a container and says of each whom the agent takes for its peer, asked as soon as it is accepted. It does so from a socket in
// the container's namespace, as silk-tls does.
func (m *member) accepting(r *running, port uint16) (netip.AddrPort, chan string) {
	m.w.t.Helper()
	at := netip.AddrPortFrom(m.address, port)
	l, err := tcp.Listen(m.ns, at, 16)
	if err != nil {
		m.w.t.Fatal(err)
	}
	m.w.t.Cleanup(func() { l.Close() })
	client, said := r.peers(), make(chan string, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p, err := client.Peer(m.w.t.Context(), c.RemoteAddr().(*net.TCPAddr).AddrPort(), c.LocalAddr().(*net.TCPAddr).AddrPort(), policy.TCP)
			said <- fmt.Sprintf("%s %v", p.Group, err)
			c.Close()
		}
	}()
	return at, said
}

// says connects from a namespace and returns what accepting said of it.
func says(t *testing.T, from *kernel.NS, at netip.AddrPort, said chan string) string {
	t.Helper()
	c, err := tcp.Dial(t.Context(), from, at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return <-said
}

// TestPeersOnOneHost: who accepts a connection is told who began it, also when the mark has other bits than usual and others keep something in it.
func TestPeersOnOneHost(t *testing.T) {
	for _, mask := range []uint32{0xffff, 0x0ffff000} {
		w := newWorld(t)
		r := w.start(w.policies(), func(c *Config) { c.ConnMask = mask })
		web, api, other := w.attach("web"), w.attach("api"), w.attach("other")
		w.onHost(`nft add table ip foreign && nft 'add chain ip foreign pre { type filter hook prerouting priority -100; }' &&
			nft add rule ip foreign pre ct state new ct mark set 0x30000000`)
		w.allow(r, tcpPolicy("web", "api", 61443), tcpPolicy("other", "api", 61443))
		w.allow(r, policy.Policy{Source: "web", Destination: "api", Protocol: policy.TCP, Ports: policy.Ports{First: 7000, Last: 7005}})
		for _, m := range []*member{web, api, other} {
			if status, text := r.force("/force-policy-poll-cycle?network=silk&interface=eth0&container=" + m.key.Container); status != 200 {
				t.Fatalf("wait for %v: %d %s", m.key, status, text)
			}
		}
		at, said := api.accepting(r, 61443)
		for range 20 {
			for _, m := range []*member{web, other} {
				if got, want := says(t, m.ns, at, said), map[*member]string{web: "web", other: "other"}[m]+" <nil>"; got != want {
					t.Errorf("mask %#x: the peer is %s, want %s", mask, got, want)
				}
			}
		}
		rangeAt, rangeSaid := api.accepting(r, 7003)
		if got := says(t, web.ns, rangeAt, rangeSaid); got != "web <nil>" {
			t.Errorf("mask %#x: by a range of ports the peer is %s", mask, got)
		}
		if got := says(t, w.ns, at, said); !strings.Contains(got, "bears no tag: no policy let it in") && !strings.Contains(got, "passes this host") {
			t.Errorf("mask %#x: of the host itself it is said: %s", mask, got)
		}
		netns.Shell(t, api.ns, "ip link set lo up") // by which a container reaches itself
		if got := says(t, api.ns, at, said); !strings.Contains(got, "passes this host") {
			t.Errorf("mask %#x: of the container itself it is said: %s", mask, got)
		}
		r.stop()
	}
}

// TestSomebodyHoldsTheLocalSocket: the agent works without it, and listens there once it is free.
func TestSomebodyHoldsTheLocalSocket(t *testing.T) {
	w := newWorld(t)
	port := freePort(t)
	held, err := net.Listen("unix", policyhttp.PeerSocket(uint16(port)))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	r := w.startAt(port, w.policies())
	web, api := w.attach("web"), w.attach("api")
	w.allow(r, tcpPolicy("web", "api", 61443))
	if status, text := r.force("/force-policy-poll-cycle?network=silk&interface=eth0&container=" + api.key.Container); status != 200 {
		t.Fatalf("the agent does not work: %d %s", status, text)
	}
	held.Close()
	client := r.peers()
	nobody := netip.MustParseAddrPort("10.255.30.250:1")
	eventually(t, "the agent does not listen", 30*time.Second, func() bool {
		_, err := client.Peer(t.Context(), nobody, netip.AddrPortFrom(web.address, 2), policy.TCP)
		return errors.Is(err, fault.NotFound)
	})
}

// TestPeersThatAreNotKnown: what is not known is refused with a reason, and how it becomes known.
func TestPeersThatAreNotKnown(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	w.allow(r, tcpPolicy("web", "api", 61443))
	if status, text := r.force("/force-policy-poll-cycle?network=silk&interface=eth0&container=" + api.key.Container); status != 200 {
		t.Fatal(status, text)
	}
	ask := func(query string) (int, string) { return r.get(r.cfg.debugAddress(), "/peer?"+query) }
	for query, want := range map[string]string{
		"": "source=", "source=10.255.30.2:1": "destination=", "source=10.255.30.2&destination=10.255.30.3:1": "expected an address and a port",
		"source=10.255.30.2:0&destination=10.255.30.3:1": "source=", "source=10.255.30.2:1&source=10.255.30.2:2&destination=10.255.30.3:1": "once",
		"source=10.255.30.2:1&destination=10.255.30.3:1&protocol=icmp":             "expected tcp or udp",
		"source=10.255.30.2:1&destination=10.255.30.3:1&protocol=tcp&protocol=udp": "once",
		"source=%zz": "query", "source=[fe80::1%25eth0]:1&destination=10.255.30.3:1": "source=",
	} {
		if status, text := ask(query); status != 400 || !strings.Contains(text, want) {
			t.Errorf("%s: %d %s, want 400 with %s", query, status, text, want)
		}
	}
	none := "no tcp connection from 10.255.30.2:1 to 10.255.30.3:1 passes this host"
	if status, text := ask("source=10.255.30.2:1&destination=10.255.30.3:1"); status != 404 || !strings.Contains(text, none) {
		t.Errorf("%d %s", status, text)
	}
	at, said := api.accepting(r, 61443)
	if got := says(t, web.ns, at, said); got != "web <nil>" {
		t.Fatalf("the peer is %s", got)
	}
	c, err := tcp.Dial(t.Context(), web.ns, at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	<-said
	query := url.Values{"source": {c.LocalAddr().String()}, "destination": {at.String()}}.Encode()
	if status, text := ask(query); status != 200 || !strings.HasPrefix(text, `{"tag":"`) || !strings.HasSuffix(strings.TrimSpace(text), `","group":"web"}`) {
		t.Errorf("%d %s", status, text)
	}
	r.mu.Lock() // as after a start without state: the kernel remembers tags of groups that nobody names
	held := r.held.State()
	held.Listed = nil
	r.held = held.Restore(watchWait)
	r.version++
	r.mu.Unlock()
	if status, text := ask(query); status != 404 || !strings.Contains(text, "no policy known to this host names its group") {
		t.Errorf("%d %s", status, text)
	}
	client := r.peers()
	r.stop()
	if _, err := client.Peer(t.Context(), netip.MustParseAddrPort(c.LocalAddr().String()), at, policy.TCP); !errors.Is(err, fault.Unavailable) {
		t.Errorf("without the agent: %v, want fault.Unavailable", err)
	}
}

// TestPeersOfTwoHosts: the tag comes with the packet from another host.
func TestPeersOfTwoHosts(t *testing.T) {
	a, b := newWorld(t), newWorld(t)
	join(t, a, b)
	store := a.policies()
	b.store = store
	here, there := a.start(store), b.start(store, func(c *Config) { c.Host = "10.0.16.2" })
	web := a.attachIn("10.255.1.0/24", "web")
	api := b.attachIn("10.255.2.0/24", "api")
	rev, err := store.CreateWithin(t.Context(), []policy.Policy{tcpPolicy("web", "api", 61443)}, 0)
	if err != nil {
		t.Fatal(err)
	}
	for r, m := range map[*running]*member{here: web, there: api} {
		if status, text := r.force("/force-policy-poll-cycle?network=silk&interface=eth0&container=" + m.key.Container); status != 200 {
			t.Fatalf("wait for %v: %d %s", m.key, status, text)
		}
		r.inForceAt(rev.Counter)
	}
	at, said := api.accepting(there, 61443)
	for range 20 {
		if got := says(t, web.ns, at, said); got != "web <nil>" {
			t.Fatalf("the peer is %s", got)
		}
	}
}

// join gives two hosts an underlay and an overlay.
func join(t *testing.T, worlds ...*world) {
	t.Helper()
	worlds[0].onHost(fmt.Sprintf("ip link add eth0 type veth peer name eth0 netns /proc/%d/fd/%d", os.Getpid(), worlds[1].ns.FD()))
	for i, w := range worlds {
		w.onHost(fmt.Sprintf("ip addr add 10.0.16.%d/24 dev eth0 && ip link set eth0 up", i+1))
	}
	var leases []lease.Lease
	for i := range worlds {
		subnet := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 255, byte(i + 1), 0}), 24)
		leases = append(leases, lease.Lease{Underlay: netip.AddrFrom4([4]byte{10, 0, 16, byte(i + 1)}), Subnet: subnet, MAC: lease.MACOf(subnet)})
	}
	for i, w := range worlds {
		f, err := overlay.Open(w.ns)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if _, err := f.Set(t.Context(), overlay.Config{
			Device: "silk-vtep", VNI: 1, Port: 4789, Underlay: leases[i].Underlay, Network: netip.MustParsePrefix("10.255.0.0/16"), Local: leases[i], Peers: leases,
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// attachIn makes a container of a group with an address of a subnet.
func (w *world) attachIn(subnet string, group identity.Group) *member {
	return w.attachAs("c-"+string(group), string(group), netip.Addr{}, func(s *endpoint.Spec) { s.Subnet = netip.MustParsePrefix(subnet) })
}

func FuzzPeerQuery(f *testing.F) {
	f.Add("source=10.255.30.2:41000&destination=10.255.30.3:61443&protocol=tcp")
	f.Add("source=[::ffff:10.0.0.1]:1&destination=[::1]:2&protocol=udp")
	f.Add("source=10.255.30.2:0&destination=;&source=")
	f.Fuzz(func(t *testing.T, raw string) {
		c, err := parsePeerQuery(raw)
		if err != nil {
			return
		}
		bad := func(a netip.AddrPort) bool {
			return !a.IsValid() || a.Port() == 0 || a.Addr().Is4In6() || a.Addr().Zone() != ""
		}
		if c.protocol != policy.TCP && c.protocol != policy.UDP || bad(c.source) || bad(c.destination) {
			t.Fatalf("%q became %+v", raw, c)
		}
	})
}
