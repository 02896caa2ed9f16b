package tlsproxy

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

func TestATakenPortIsReportedAndTriedAgain(t *testing.T) {
	w := newWorld(t)
	api, web := w.attach(standard, endpoint.TLSListener{Listen: 61444, Forward: 8080}), w.attach()
	held := inNSListener(t, api, 61443)
	api.listen(8080, echo)
	r := w.start()
	testkit.Within(t, patience, func() string {
		e := r.stands(api)
		if len(e.Ports) != 2 || e.Ports[0].State != stateTaken || e.Ports[1].State != stateListening {
			return fmt.Sprintf("ports are %+v", e.Ports)
		}
		return ""
	})
	if _, text := r.get("/health"); !hasText(text, "degraded") || !hasText(text, "61443 of the container is taken") {
		t.Errorf("health says %s", text)
	}
	if _, text := r.get("/metrics"); !hasText(text, `silk_tls_ports{state="taken"} 1`) || !hasText(text, `silk_tls_ports{state="listening"} 1`) {
		t.Errorf("metrics do not say so")
	}
	passes := r.follow.Stats().Passes
	testkit.Until(t, patience, "it is tried again", func() bool { return r.follow.Stats().Passes > passes+2 })
	if n := strings.Count(r.log.String(), "port does not listen"); n != 1 {
		t.Errorf("the log says %d times that the port is taken, want once", n)
	}
	held.Close()
	r.listens(api)
	c, _ := web.mustSecure(api)
	if err := said(c, "hello"); err != nil {
		t.Error(err)
	}
}

func inNSListener(t *testing.T, m *member, port int) net.Listener {
	t.Helper()
	var l net.Listener
	if err := m.ns.Do(func() (err error) { l, err = net.Listen("tcp4", fmt.Sprintf(":%d", port)); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// TestAContainerThatIsRemoved takes its ports and connections along at once.
func TestAContainerThatIsRemoved(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, stays, web := w.attach(standard), w.attach(standard), w.attach()
	api.listen(8080, echo)
	stays.listen(8080, echo)
	r.listens(api)
	r.listens(stays)
	c, _ := web.mustSecure(api)
	if err := said(c, "hello"); err != nil {
		t.Fatal(err)
	}
	waiting := web.dial(api, 61443) // has said nothing yet
	other, _ := web.mustSecure(stays)
	s := r.port(api).site
	api.detach()
	testkit.Until(t, time.Second, "connections end with the container", func() bool { return s.count() == 0 && r.count() == 1 })
	if e := r.stands(api); len(e.Ports) > 0 {
		t.Errorf("ports of a container that has gone: %+v", e)
	}
	if err := said(other, "hello"); err != nil {
		t.Errorf("another container's connection: %v", err)
	}
	waiting.Close()
}

// TestNoNamespaceIsKept: one that everybody else has left goes with all that is in it, though nobody said that the container went.
func TestNoNamespaceIsKept(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, stays, web := w.attach(standard), w.attach(standard), w.attach()
	l := inNSListener(t, api, 8080)
	r.listens(api)
	r.listens(stays)
	for range 10 {
		web.mustSecure(api)
		app, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		app.(*net.TCPConn).SetLinger(0) // the container's processes end, as far as the kernel is concerned
		app.Close()
		silent := web.dial(api, 61443) // handshakes that have not begun
		defer silent.Close()
	}
	device := endpoint.Device(api.address)
	if out := netns.Shell(t, w.ns, "ip -br link"); !hasText(out, device) {
		t.Fatalf("no device %s: %s", device, out)
	}
	testkit.Until(t, patience, "silent connections are there", func() bool { return r.count() >= 10 })
	l.Close()
	api.ns.Close()
	// The kernel takes one namespace of the machine down after the other: others may be before it.
	testkit.Until(t, 6*patience, "the namespace goes, and its devices with it", func() bool { return !hasText(netns.Shell(t, w.ns, "ip -br link"), device) })
	if r.count() != 0 || len(r.stands(stays).Ports) != 1 {
		t.Errorf("%d connections are left; the other container has %+v", r.count(), r.stands(stays))
	}
}
