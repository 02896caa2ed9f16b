package daemon_test

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/lease/leasehttp"
	"github.com/vishvananda/netlink"
)

// exits starts the daemon and expects that it ends with 1 and says all of these.
func (h *host) exits(texts ...string) {
	h.t.Helper()
	h.start()
	code, out := h.proc.wait(h.t)
	h.proc = nil
	if code != 1 {
		h.t.Errorf("exit code %d, want 1", code)
	}
	for _, s := range append(texts, "silk-daemon error: ") {
		if !strings.Contains(out, s) {
			h.t.Errorf("output lacks %q:\n%s", s, out)
		}
	}
}

func broken(w http.ResponseWriter, _ *http.Request) {
	w.WriteHeader(http.StatusInternalServerError)
	w.Write([]byte(`{"error": "it broke"}`))
}

func TestDaemonExitsWithoutALease(t *testing.T) {
	w := newWorld(t)
	h := w.host(10)
	t.Run("controller unreachable", func(t *testing.T) { h.exits("acquire subnet lease: ", "connection refused") })
	t.Run("acquire 500", func(t *testing.T) {
		w.serve(http.HandlerFunc(broken))
		h.exits("acquire subnet lease: ", "http status 500: it broke")
		w.away()
	})
	t.Run("client timeout", func(t *testing.T) {
		ln, err := net.Listen("tcp", controllerIP+":4103") // accepts and never speaks
		must(t, err)
		defer ln.Close()
		start := time.Now()
		h.exits("acquire subnet lease: ")
		if took := time.Since(start); took < 2*time.Second || took > 4*time.Second {
			t.Errorf("it took %v, want the timeout of 2 s", took)
		}
	})
	t.Run("bad CA", func(t *testing.T) {
		bad := filepath.Join(h.dir, "bad.crt")
		must(t, os.WriteFile(bad, []byte("x"), 0o600))
		was := h.config["ca_cert_file"]
		h.config["ca_cert_file"] = bad
		h.exits("create tls config: ")
		h.config["ca_cert_file"] = was
	})
	t.Run("bad config", func(t *testing.T) {
		h.config["vni"] = 0
		h.exits("load config file: invalid config: ", "vni")
		h.config["vni"] = 1
	})
	w.controller("a.db")
	t.Run("unknown lower device", func(t *testing.T) {
		h.config["vxlan_interface_name"] = "nope0"
		h.exits("create vtep", "nope0")
		delete(h.config, "vxlan_interface_name")
	})
	t.Run("store unreadable", func(t *testing.T) {
		must(t, os.RemoveAll(filepath.Join(h.dir, "state")))
		if link, err := h.nl.LinkByName(vtep); err == nil {
			h.nl.LinkDel(link)
		}
		store := filepath.Join(h.dir, "store.json")
		must(t, os.WriteFile(store, []byte("{"), 0o600))
		h.exits("read datastore: ")
		must(t, os.WriteFile(store, nil, 0o600))
		h.start()
		h.ready()
	})
	t.Run("port taken", func(t *testing.T) {
		other := w.host(11)
		must(t, other.ns.Do(func() error {
			ln, err := net.Listen("tcp", "127.0.0.1:23954")
			if err == nil {
				t.Cleanup(func() { ln.Close() })
			}
			return err
		}))
		other.exits("info endpoint: ", "address already in use")
	})
	t.Run("second daemon on the same state", func(t *testing.T) {
		p := h.run("silk-daemon")
		code, out := p.wait(t)
		if code != 1 || !strings.Contains(out, "is another silk-daemon running") {
			t.Errorf("exit code %d:\n%s", code, out)
		}
	})
}

func TestDaemonRefusesAHostThatOverlaps(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	eth, err := h.nl.LinkByName("eth0")
	must(t, err)
	route := func(dst string) *netlink.Route {
		return &netlink.Route{LinkIndex: eth.Attrs().Index, Dst: address(dst).IPNet, Gw: net.ParseIP(controllerIP)}
	}
	for _, dst := range []string{"10.255.0.0/16", "10.255.7.0/24", "10.255.255.255/32"} {
		must(t, h.nl.RouteAdd(route(dst)))
		h.exits("check host: ", dst, "eth0")
		must(t, h.nl.RouteDel(route(dst)))
	}
	h.config["overlay_network"] = "10.0.0.0/16"
	h.exits("check host: ", "underlay address "+h.ip)
	delete(h.config, "overlay_network")
	must(t, os.WriteFile(h.config["resolv_conf"].(string), []byte("nameserver 10.255.255.53\n"), 0o600))
	h.exits("check host: ", "resolver 10.255.255.53")
	must(t, os.WriteFile(h.config["resolv_conf"].(string), []byte("nameserver 192.0.2.53\n"), 0o600))
	must(t, h.nl.RouteAdd(route("10.0.0.0/8")))
	h.start()
	h.ready()
	if !strings.Contains(h.proc.out.String(), "contains the overlay network") {
		t.Error("a route that contains the overlay was not warned about")
	}
}

func TestDaemonRefusesALeaseOutsideTheOverlay(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	h.start()
	n := h.ready()
	h.term()
	remove := h.container(netip.MustParsePrefix(n.OverlaySubnet).Addr().Next().Next().String())
	h.config["overlay_network"] = "10.254.0.0/16"
	h.exits("discovered lease is not in overlay network and has containers: 1")
	if _, err := h.nl.LinkByName(vtep); err != nil {
		t.Errorf("the device: %v", err)
	}
	remove()
	w.away()
	w.controller("b.db", func(c *controllerConfig) { c.Network = netip.MustParsePrefix("10.254.0.0/16") })
	h.start()
	if n := h.ready(); !strings.HasPrefix(n.OverlaySubnet, "10.254.") {
		t.Errorf("%+v", n)
	}
}

func TestDaemonStartsFromWhatIsLeft(t *testing.T) {
	w := newWorld(t)
	store := w.store("a.db")
	inner := leasehttp.Handler(store, discard, leasehttp.HandlerOptions{})
	w.serve(inner)
	h := w.host(10)
	h.start()
	n := h.ready()
	subnet := netip.MustParsePrefix(n.OverlaySubnet)
	link := func() netlink.Link {
		l, err := h.nl.LinkByName(vtep)
		must(t, err)
		return l
	}
	restart := func(t *testing.T) {
		t.Helper()
		h.start()
		if again := h.ready(); again.OverlaySubnet != n.OverlaySubnet {
			t.Errorf("%+v, before %v", again, n.OverlaySubnet)
		}
		want := fmt.Sprintf("%v/16", subnet.Addr())
		if got := h.addresses(vtep); len(got) != 1 || got[0] != want {
			t.Errorf("addresses %v, want %s", got, want)
		}
	}
	t.Run("device without an address", func(t *testing.T) {
		h.kill()
		must(t, h.nl.AddrDel(link(), address(fmt.Sprintf("%v/16", subnet.Addr()))))
		restart(t)
	})
	t.Run("device with another address", func(t *testing.T) {
		h.kill()
		must(t, h.nl.AddrDel(link(), address(fmt.Sprintf("%v/16", subnet.Addr()))))
		must(t, h.nl.AddrAdd(link(), address("192.0.2.1/24")))
		h.start()
		h.ready()
		must(t, h.nl.AddrDel(link(), address("192.0.2.1/24"))) // a stranger's, it was left alone
		h.kill()
		restart(t)
	})
	t.Run("device only, with containers, controller away", func(t *testing.T) {
		h.kill()
		w.away()
		must(t, os.RemoveAll(filepath.Join(h.dir, "state")))
		remove := h.container(subnet.Addr().Next().Next().String())
		h.start()
		if got := h.becomes("degraded"); got.OverlaySubnet != n.OverlaySubnet {
			t.Errorf("%+v, before %v", got, n.OverlaySubnet)
		}
		remove()
		w.serve(inner)
		h.becomes("ready")
	})
	t.Run("nothing but containers", func(t *testing.T) {
		h.kill()
		must(t, os.RemoveAll(filepath.Join(h.dir, "state")))
		must(t, h.nl.LinkDel(link()))
		remove := h.container(subnet.Addr().Next().Next().String())
		restart(t)
		remove()
	})
	t.Run("renewal not found", func(t *testing.T) { // and no containers: it acquires
		h.kill()
		must(t, os.RemoveAll(filepath.Join(h.dir, "state")))
		w.away()
		w.serve(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if r.URL.Path == leasehttp.PathRenew {
				rw.WriteHeader(http.StatusNotFound)
				return
			}
			inner.ServeHTTP(rw, r)
		}))
		h.start()
		h.ready()
		if out := h.proc.out.String(); !strings.Contains(out, "http status 404") || !strings.Contains(out, "lease acquired") {
			t.Errorf("output:\n%s", out)
		}
	})
	t.Run("stale entry in the deployed store", func(t *testing.T) {
		h.kill()
		w.away()
		must(t, os.WriteFile(filepath.Join(h.dir, "store.json"), fmt.Appendf(nil, `{"x":{"handle":"x","ip":"%v","metadata":null}}`+"\n", subnet.Addr().Next().Next()), 0o600))
		w.serve(inner)
		must(t, store.Release(t.Context(), netip.MustParseAddr(h.ip)))
		thief := netip.MustParseAddr("10.0.16.99")
		must(t, store.Renew(t.Context(), leaseOf(thief, subnet)))
		h.start()
		if got := h.ready(); got.OverlaySubnet == n.OverlaySubnet {
			t.Errorf("%+v: the lost lease is used", got)
		}
		if !strings.Contains(h.proc.out.String(), "entries without a container") {
			t.Error("the stale entry was not told about")
		}
	})
}
