package cli_test

import (
	"context"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/cli"
	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestEndpointLimit changes the limits of a container step by step.
func TestEndpointLimit(t *testing.T) {
	host, err := kernel.NewNS()
	testkit.Require(t, "netns", err)
	defer host.Close()
	inside, err := kernel.NewNS()
	testkit.Require(t, "netns", err)
	defer inside.Close()
	dir := filepath.Join(t.TempDir(), "endpoints")
	silk := func(args ...string) (code int, stdout, stderr string) {
		var out, errs strings.Builder
		host.Do(func() error {
			code = cli.Run(context.Background(), append([]string{"endpoint", "--dir", dir}, args...), &out, &errs)
			return nil
		})
		return code, out.String(), errs.String()
	}
	if code, _, text := silk("list"); code != 1 || !strings.Contains(text, "--dir is wrong") {
		t.Errorf("list without a directory: %d %s", code, text)
	}
	d, err := endpoint.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"eth0", "eth1"} {
		if err := host.Do(func() error {
			s := endpoint.Spec{Key: endpoint.Key{Network: "silk", Container: "c-" + name, Interface: name}, Namespace: inside, Subnet: netip.MustParsePrefix("10.255.30.0/24"), MTU: 1450, Group: "web"}
			if name == "eth0" {
				s.PortMaps = []endpoint.PortMap{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp"}, {HostIP: netip.MustParseAddr("10.0.0.1"), HostPort: 53, ContainerPort: 53, Protocol: "udp"}}
			}
			_, err := d.Attach(context.Background(), s, nil)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	if code, out, text := silk("list"); code != 0 || !strings.Contains(out, "c-eth0     eth0       silk     10.255.30.2  web    8080>80/tcp,10.0.0.1:53>53/udp  -      -") {
		t.Errorf("list: %d %s%s", code, out, text)
	}
	for _, x := range []struct {
		args string
		want endpoint.Limits
		says string
	}{
		{"limit c-eth0 --ingress-rate 100M", endpoint.Limits{IngressRate: 1e8, IngressBurst: 1e6}, "100M"},
		{"limit c-eth0 --egress-rate 1.5g --egress-burst 20M", endpoint.Limits{IngressRate: 1e8, IngressBurst: 1e6, EgressRate: 15e8, EgressBurst: 2e7}, "1500M"},
		{"limit c-eth0 --ingress-burst 2M", endpoint.Limits{IngressRate: 1e8, IngressBurst: 2e6, EgressRate: 15e8, EgressBurst: 2e7}, ""},
		{"limit c-eth0 --ingress-rate 0 --egress-rate 8k", endpoint.Limits{EgressRate: 8000, EgressBurst: 11712}, "8k"},
		{"limit c-eth0 --egress-burst 8k", endpoint.Limits{EgressRate: 8000, EgressBurst: 11712}, "expected at least 11712"},
		{"limit c-eth0 --egress-rate fast", endpoint.Limits{EgressRate: 8000, EgressBurst: 11712}, `--egress-rate: "fast": expected bits`},
		{"limit c-eth0", endpoint.Limits{EgressRate: 8000, EgressBurst: 11712}, "no limit is named"},
		{"limit nobody --egress-rate 1M", endpoint.Limits{EgressRate: 8000, EgressBurst: 11712}, "no container nobody"},
	} {
		_, out, text := silk(strings.Fields(x.args)...)
		if !strings.Contains(out+text, x.says) {
			t.Errorf("%s: %s%s", x.args, out, text)
		}
		r, err := d.Lookup(endpoint.Key{Network: "silk", Container: "c-eth0", Interface: "eth0"})
		if err != nil || r.Limits == nil || *r.Limits != x.want {
			t.Errorf("%s: recorded %+v, %v, want %+v", x.args, r.Limits, err, x.want)
		}
	}
}
