package daemon_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/overlay"
	"github.com/google/go-cmp/cmp"
)

// dump returns all that Silk might have changed on a host.
func (h *host) dump() string {
	h.t.Helper()
	eventually(h.t, 10*time.Second, "carrier on the underlay", func() error { // the kernel looks at carriers once a second, and later on a busy machine
		if out := h.command("ip", "link"); strings.Contains(out, "NO-CARRIER") || strings.Contains(out, "LOWERLAYERDOWN") {
			return errors.New(out)
		}
		return nil
	})
	var b strings.Builder
	for _, c := range []string{"ip -d link", "ip addr", "ip route show table all", "ip -6 route show table all", "ip rule", "ip neigh", "bridge fdb"} {
		fmt.Fprintf(&b, "# %s\n%s", c, h.command(strings.Fields(c)...))
	}
	fmt.Fprintf(&b, "# nft list ruleset\n%s", h.rules())
	must(h.t, h.ns.Do(func() error {
		return filepath.WalkDir("/proc/sys/net", func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() || strings.HasPrefix(path, "/proc/sys/net/netfilter/nf_conntrack_count") {
				return err
			}
			if v, err := os.ReadFile(path); err == nil { // some can only be written
				fmt.Fprintf(&b, "%s = %s", path, v)
			}
			return nil
		})
	}))
	must(h.t, filepath.WalkDir(h.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && filepath.Base(path) != "config.json" {
			fmt.Fprintln(&b, path)
		}
		return err
	}))
	return changing.ReplaceAllString(b.String(), "")
}

// changing is what differs between two dumps of the same host: life times, and neighbours that the underlay's traffic made.
var changing = regexp.MustCompile(`(?m)^.*(nf_conntrack_count|random|neigh/default/).*\n|^10\.0\.16\.\d+ dev eth0.*(REACHABLE|STALE|DELAY|PROBE).*\n`)

// teardown runs silk-teardown and returns its exit code and output.
func (h *host) teardown(args ...string) (int, string) {
	h.t.Helper()
	return h.run("silk-teardown", args...).wait(h.t)
}

func TestTeardownLeavesTheHostAsItWas(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	before := h.dump()
	h.start()
	n := h.ready()
	peer := netip.MustParsePrefix("10.255.200.0/24")
	must(t, w.api().Renew(t.Context(), leaseOf(netip.MustParseAddr("10.0.16.77"), peer)))
	h.hasPaths(5*time.Second, "10.0.16.77", peer.String())
	// A container that came and went by our own plugin's means, and one whose namespace went without a word.
	dir, err := endpoint.Open(h.config["endpoint_dir"].(string))
	must(t, err)
	subnet := netip.MustParsePrefix(n.OverlaySubnet)
	ns, err := kernel.NewNS()
	must(t, err)
	attach := func(id string) endpoint.Key {
		k := endpoint.Key{Network: "net", Container: id, Interface: "eth0"}
		must(t, h.ns.Do(func() error {
			_, err := dir.Attach(t.Context(), endpoint.Spec{Key: k, Namespace: ns, Subnet: subnet, MTU: n.MTU,
				PortMaps: []endpoint.PortMap{{HostPort: 8000 + uint16(len(id)), ContainerPort: 80, Protocol: "tcp"}}, Limits: &endpoint.Limits{EgressRate: 8e6, EgressBurst: 160000}}, nil)
			return err
		}))
		return k
	}
	k := attach("one")
	must(t, kernel.HoldLocal(h.ns, netip.MustParseAddr("169.254.0.2"), overlay.Protocol)) // what silk-dns makes
	h.term()
	policies, err := nft.Open(h.ns, nft.Options{}) // what vxlan-policy-agent makes
	must(t, err)
	_, err = policies.Set(t.Context(), firewall.Ruleset{Network: netip.MustParsePrefix("10.255.0.0/16"), VTEP: vtep})
	must(t, err)
	if code, out := h.teardown(); code != 1 || !strings.Contains(out, "1 containers are attached") {
		t.Errorf("with a container attached: exit code %d:\n%s", code, out)
	}
	if err := h.whole(n.OverlaySubnet, "10.0.16.77", peer.String()); err != nil {
		t.Errorf("a refused teardown changed the host: %v", err)
	}
	must(t, h.ns.Do(func() error { return dir.Detach(t.Context(), k, ns, nil) }))
	attach("two")
	must(t, ns.Close())
	eventually(t, 5*time.Second, "the container's device is gone", func() error {
		if out := h.command("ip", "link"); strings.Contains(out, "s-") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if st, err := policies.Stats(t.Context()); err != nil || st.Owned {
		if code, out := h.teardown(); code != 1 || !strings.Contains(out, "vxlan-policy-agent is running") {
			t.Errorf("with the agent running: exit code %d:\n%s", code, out)
		}
		if err := h.whole(n.OverlaySubnet, "10.0.16.77", peer.String()); err != nil {
			t.Errorf("a refused teardown changed the host: %v", err)
		}
	}
	must(t, policies.Close())
	if code, out := h.teardown(); code != 0 || !strings.Contains(out, "complete") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(h.dump(), "\n")); diff != "" {
		t.Errorf("the host is not as it was (-before +after):\n%s", diff)
	}
	ls, err := w.api().Leases(t.Context())
	if err != nil || len(ls) != 1 || ls[0].Underlay.String() != "10.0.16.77" {
		t.Errorf("leases %v, %v", ls, err)
	}
}

func TestTeardownTriesEverything(t *testing.T) {
	w := newWorld(t)
	w.controller("a.db")
	h := w.host(10)
	up := func() {
		w.away()
		w.controller("a.db")
		h.start()
		h.ready()
		h.term()
		w.away()
	}
	gone := func(t *testing.T) {
		t.Helper()
		if out := h.command("ip", "link"); strings.Contains(out, vtep) {
			t.Errorf("the device is left:\n%s", out)
		}
		if rules := h.rules(); rules != "" {
			t.Errorf("rules are left:\n%s", rules)
		}
	}
	t.Run("controller down", func(t *testing.T) {
		up()
		if code, out := h.teardown(); code != 1 || !strings.Contains(out, "silk-teardown error: release subnet lease: ") {
			t.Errorf("exit code %d:\n%s", code, out)
		}
		gone(t)
	})
	t.Run("controller answers 500", func(t *testing.T) {
		up()
		w.serve(http.HandlerFunc(broken))
		if code, out := h.teardown(); code != 1 || !strings.Contains(out, "release subnet lease: ") || !strings.Contains(out, "http status 500: it broke") {
			t.Errorf("exit code %d:\n%s", code, out)
		}
		gone(t)
		w.away()
	})
	t.Run("certificates gone", func(t *testing.T) {
		up()
		was := h.config["client_key_file"]
		h.config["client_key_file"] = filepath.Join(h.dir, "none.key")
		if code, out := h.teardown(); code != 1 || !strings.Contains(out, "release subnet lease: create tls config: ") {
			t.Errorf("exit code %d:\n%s", code, out)
		}
		h.config["client_key_file"] = was
		gone(t)
	})
	t.Run("nothing there and controller down: both are told", func(t *testing.T) {
		code, out := h.teardown()
		if code != 1 || !strings.Contains(out, "release subnet lease: ") || !strings.Contains(out, "delete vtep: find link silk-vtep: Link not found") {
			t.Errorf("exit code %d:\n%s", code, out)
		}
	})
	t.Run("container attached, forced", func(t *testing.T) {
		up()
		w.controller("a.db")
		remove := h.container("10.255.30.2")
		h.command("nft", "add table inet silk-policy; add chain inet silk-policy forward; add rule inet silk-policy forward drop")
		if code, out := h.teardown("-force"); code != 0 {
			t.Errorf("exit code %d:\n%s", code, out)
		}
		if out := h.command("ip", "link"); !strings.Contains(out, "s-010255030002") {
			t.Errorf("the container's device is gone:\n%s", out)
		}
		if out := h.rules(); !strings.Contains(out, "silk-policy") {
			t.Errorf("containers that live are open to each other:\n%s", out)
		}
		h.command("nft", "delete table inet silk-policy")
		gone(t)
		remove()
	})
	t.Run("daemon running", func(t *testing.T) {
		h.start()
		h.ready()
		if code, out := h.teardown(); code != 1 || !strings.Contains(out, "silk-daemon is running") {
			t.Errorf("exit code %d:\n%s", code, out)
		}
		h.becomes("ready")
	})
	t.Run("release asks for the underlay address", func(t *testing.T) {
		h.term()
		w.away()
		bodies := make(chan string, 1)
		w.serve(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			b := make([]byte, 200)
			n, _ := r.Body.Read(b)
			bodies <- r.Method + " " + r.URL.Path + " " + string(b[:n])
			rw.Write([]byte("{}"))
		}))
		if code, out := h.teardown(); code != 0 {
			t.Errorf("exit code %d:\n%s", code, out)
		}
		if got, want := <-bodies, `PUT /leases/release {"underlay_ip":"10.0.16.10"}`; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	})
}
