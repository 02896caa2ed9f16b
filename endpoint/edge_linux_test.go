package endpoint_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

func (h host) sh(script string) string {
	h.t.Helper()
	var out []byte
	if err := h.ns.Do(func() (err error) { out, err = exec.Command("sh", "-ec", script).CombinedOutput(); return err }); err != nil {
		h.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

func (h host) restore() int {
	h.t.Helper()
	n := 0
	if err := h.ns.Do(func() (err error) { n, err = h.dir.RestorePorts(context.Background()); return err }); err != nil {
		h.t.Fatal(err)
	}
	return n
}

func (h host) limit(k endpoint.Key, l endpoint.Limits) (r endpoint.Record, err error) {
	err = h.ns.Do(func() error {
		r, err = h.dir.SetLimits(context.Background(), k, func(endpoint.Record) (endpoint.Limits, error) { return l, nil })
		return err
	})
	return r, err
}

func tcp(host, container uint16) endpoint.PortMap {
	return endpoint.PortMap{HostPort: host, ContainerPort: container, Protocol: "tcp"}
}

// TestPortMapsAreRestored after whatever somebody did to them, and none that is nobody's is left.
func TestPortMapsAreRestored(t *testing.T) {
	h, c1, c2 := newHost(t), netns.New(t), netns.New(t)
	if n := h.restore(); n != 0 || h.sh("nft list ruleset") != "" {
		t.Errorf("%d restored where nothing is", n)
	}
	s := h.spec("c1", c1)
	s.PortMaps = []endpoint.PortMap{tcp(8080, 80), {HostIP: netip.MustParseAddr("10.0.16.15"), HostPort: 53, ContainerPort: 5353, Protocol: "udp"}}
	h.must(h.attach(s))
	other := h.spec("c2", c2)
	other.PortMaps = []endpoint.PortMap{tcp(8081, 80)}
	second := h.must(h.attach(other))
	if n := h.restore(); n != 0 {
		t.Errorf("%d restored where nothing is wrong", n)
	}
	for _, damage := range []string{
		"nft flush ruleset", "nft delete element inet silk nat-ports { tcp . 8080 }", "nft delete element inet silk nat-ports { tcp . 8080 }; nft add element inet silk nat-ports { tcp . 8080 : 10.255.30.3 . 80 }",
		"nft add element inet silk nat-ports { tcp . 7 : 10.255.30.99 . 80 }", "nft flush chain inet silk nat-output", "nft flush map inet silk nat-ports-at",
	} {
		h.sh(strings.ReplaceAll(strings.ReplaceAll(damage, "{", "'{"), "}", "}'"))
		if n := h.restore(); n == 0 {
			t.Errorf("after %q nothing was restored", damage)
		}
		if d := append(h.check(s.Key, c1), h.check(other.Key, c2)...); len(d) > 0 {
			t.Errorf("after %q: %v", damage, d)
		}
		if n := h.restore(); n != 0 {
			t.Errorf("after %q the second time %d were restored", damage, n)
		}
	}
	// A record that is lost takes nothing along but itself; the file of ports may be lost too.
	if err := os.Remove(filepath.Join(h.dir.Path(), ".ports")); err != nil {
		t.Fatal(err)
	}
	if n := h.restore(); n != 0 {
		t.Errorf("without the file of ports %d changed", n)
	}
	if err := os.WriteFile(filepath.Join(h.dir.Path(), "silk@c2@eth0@"+second.Address().String()), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(h.detach(s.Key, c1), h.detach(other.Key, c2)); err != nil {
		t.Fatal(err)
	}
	if text := h.sh("nft list ruleset"); strings.Contains(text, "10.255.30") {
		t.Errorf("left:\n%s", text)
	}
}

// TestPortMapsUnderChurn: while endpoints come and go and somebody flushes the tables, what is attached in the end has its ports, and what is not has none.
func TestPortMapsUnderChurn(t *testing.T) {
	h := newHost(t)
	const n = 6
	stop := make(chan struct{})
	var repairs, work sync.WaitGroup
	repairs.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			h.ns.Do(func() error {
				if i%5 == 0 {
					exec.Command("nft", "flush", "ruleset").Run()
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				h.dir.RestorePorts(ctx)
				return nil
			})
		}
	})
	inside := make([]*kernel.NS, n)
	for i := range n {
		inside[i] = netns.New(t)
		work.Go(func() {
			s := h.spec(fmt.Sprint("c", i), inside[i])
			s.PortMaps = []endpoint.PortMap{tcp(uint16(8000+i), 80)}
			for range 8 {
				if _, err := h.attach(s); err != nil && !errors.Is(err, fault.Unavailable) {
					t.Error(err)
				}
				if err := h.detach(s.Key, nil); err != nil {
					t.Error(err)
				}
			}
			if i%2 == 0 {
				if _, err := h.attach(s); err != nil {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
	close(stop)
	repairs.Wait()
	h.restore()
	text := h.sh("nft list map inet silk nat-ports")
	for i := range n {
		if got := strings.Contains(text, fmt.Sprintf("tcp . %d :", 8000+i)); got != (i%2 == 0) {
			t.Errorf("port %d: there %v\n%s", 8000+i, got, text)
		}
	}
}

// TestAPortOfAnEarlierRecordIsFree: a name may come back with other ports or none.
func TestAPortOfAnEarlierRecordIsFree(t *testing.T) {
	h, c1, c2 := newHost(t), netns.New(t), netns.New(t)
	s := h.spec("c1", c1)
	s.Requested = netip.MustParseAddr("10.255.30.9")
	for _, maps := range [][]endpoint.PortMap{{tcp(8080, 80)}, {tcp(8080, 80), tcp(8081, 80)}, {tcp(8081, 81)}, nil} {
		s.PortMaps = maps
		h.must(h.attach(s))
		if maps != nil {
			if err := h.detach(s.Key, c1); err != nil {
				t.Fatal(err)
			}
		}
	}
	other := h.spec("c2", c2)
	other.PortMaps = []endpoint.PortMap{tcp(8080, 80), tcp(8081, 80)}
	h.must(h.attach(other))
	third := h.spec("c3", netns.New(t))
	third.PortMaps = []endpoint.PortMap{tcp(9999, 80), {HostIP: netip.MustParseAddr("10.0.0.1"), HostPort: 8081, ContainerPort: 1, Protocol: "tcp"}}
	if _, err := h.attach(third); !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "is taken by c2/eth0 on silk") {
		t.Errorf("a port that is taken: %v", err)
	}
}

// TestLimitsChange: on a live endpoint, recorded, and gone with it.
func TestLimitsChange(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	s := h.spec("c1", c)
	s.NetOut = json.RawMessage(`[{}]`)
	r := h.must(h.attach(s))
	before := h.sh("tc qdisc; ip link")
	ifb := strings.Replace(r.Device, "s-", "i-", 1)
	for _, l := range []endpoint.Limits{
		{IngressRate: 8e6, IngressBurst: 160000}, {EgressRate: 16e6, EgressBurst: 160000}, {IngressRate: 1e11, IngressBurst: 1e9, EgressRate: 24e6, EgressBurst: 320000}, {},
		{IngressRate: 8e6, IngressBurst: 160000, EgressRate: 16e6, EgressBurst: 160000},
	} {
		got, err := h.limit(s.Key, l)
		if err != nil {
			t.Fatal(err)
		}
		if stored, err := h.dir.Lookup(s.Key); err != nil || l == (endpoint.Limits{}) && stored.Limits != nil || stored.Limits != nil && *stored.Limits != l || string(stored.NetOut) != string(got.NetOut) {
			t.Errorf("%+v: recorded %+v, %v", l, stored.Limits, err)
		}
		if d := h.check(s.Key, c); len(d) > 0 {
			t.Errorf("%+v: %v", l, d)
		}
		text := h.sh("tc qdisc show dev " + r.Device + "; ip -o link show type ifb")
		if strings.Contains(text, "qdisc tbf 1:") != (l.IngressRate > 0) || strings.Contains(text, ifb) != (l.EgressRate > 0) {
			t.Errorf("%+v: %s", l, text)
		}
		h.must(h.attach(s)) // an ADD without limits is no reason to forget those that were set since
	}
	for _, bad := range []endpoint.Limits{{IngressRate: 8e6}, {EgressBurst: 1}, {EgressRate: 8e9, EgressBurst: 8e6 - 8}, {IngressRate: 7, IngressBurst: 1e6}, {IngressRate: 1e6, IngressBurst: 1 << 40}} {
		if _, err := h.limit(s.Key, bad); !errors.Is(err, fault.Invalid) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := h.limit(s.Key, endpoint.Limits{EgressRate: 8e9, EgressBurst: endpoint.SmallestBurst(8e9, 1450)}); err != nil {
		t.Errorf("the smallest burst: %v", err)
	}
	if _, err := h.limit(key("nobody"), endpoint.Limits{}); !errors.Is(err, fault.NotFound) {
		t.Errorf("nobody: %v", err)
	}
	if err := h.detach(s.Key, c); err != nil {
		t.Fatal(err)
	}
	if text := h.sh("tc qdisc; ip link"); strings.Contains(text, ifb) || strings.Contains(text, "tbf") {
		t.Errorf("before:\n%s\nleft:\n%s", before, text)
	}
}

// TestReaperTakesTheEdgeAlong: port maps and limits of a container whose namespace went, and limits that have no record.
func TestReaperTakesTheEdgeAlong(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	s := h.spec("c1", c)
	s.PortMaps = []endpoint.PortMap{tcp(8080, 80)}
	s.Limits = &endpoint.Limits{EgressRate: 8e6, EgressBurst: 160000}
	r := h.must(h.attach(s))
	h.sh("ip link del " + r.Device + "; ip link add i-010255030077 type ifb; ip link add i-eth type ifb")
	reaper := &endpoint.Reaper{Dir: h.dir}
	if err := h.ns.Do(func() error {
		for i := range 2 {
			if _, err := reaper.Pass(time.Unix(int64(i), 0)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if text := h.sh("nft list ruleset; ip link"); strings.Contains(text, "10.255.30") || strings.Contains(text, "i-010") || !strings.Contains(text, "i-eth") {
		t.Errorf("left:\n%s", text)
	}
	h.clean()
}
