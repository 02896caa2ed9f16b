package dns_test

import (
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestTheLinkLocalAddress that containers ask is the host's while the program runs, whoever takes it away, and after it, until silk-teardown.
func TestTheLinkLocalAddress(t *testing.T) {
	h := newHost(t)
	r, _ := h.attach("one", endpoint.Advertisement{Names: []string{"api.apps.internal"}})
	cfg := settings(t, object{"endpoint_dir": h.dir.Path(), "listen_dns": nil})
	p := h.launch(cfg)
	if len(p.DNS) != 1 || p.DNS[0] != "169.254.0.2:53" {
		t.Fatalf("listens at %v", p.DNS)
	}
	h.names(p, time.Second, "api.apps.internal", "NOERROR "+r.Address().String())
	route := func() string { return h.run("ip route show table local 169.254.0.2") }
	made := route()
	if !strings.Contains(made, "dev lo proto 83") {
		t.Errorf("route %q", made)
	}
	for range 2 {
		h.run("ip route del local 169.254.0.2 dev lo table local")
		testkit.Until(t, soon, "the address is back", func() bool { return route() == made })
		h.names(p, time.Second, "api.apps.internal", "NOERROR "+r.Address().String())
	}
	p.End(t)
	if route() != made {
		t.Errorf("after the end the route is %q", route())
	}
	p = h.launch(cfg)
	h.names(p, time.Nanosecond, "api.apps.internal", "NOERROR "+r.Address().String())
}
