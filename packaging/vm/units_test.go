package vm

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel/tcp"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
)

// configure writes the programs' configurations as docs/operate has them: one host that is controller, policy server and host of containers.
func configure(t *testing.T) {
	t.Helper()
	if err := os.MkdirAll("/etc/silk", 0o755); err != nil {
		t.Fatal(err)
	}
	ca, err := pki.OpenCA("/etc/silk")
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Issue("host", netip.MustParseAddr(underlay))
	if err != nil {
		t.Fatal(err)
	}
	run(t, "silk ca init --cert /etc/silk/container-ca.crt --key /etc/silk/container-ca.key")
	server := map[string]any{"ca_cert_file": ca.CertFile(), "server_cert_file": cert, "server_key_file": key}
	client := map[string]any{"ca_cert_file": ca.CertFile(), "client_cert_file": cert, "client_key_file": key}
	of := func(base, more map[string]any) map[string]any {
		maps.Copy(more, base)
		return more
	}
	controller := "https://" + underlay + ":4103"
	write(t, "/etc/silk/controller.json", of(server, map[string]any{"container_ca_cert_file": "/etc/silk/container-ca.crt", "container_ca_key_file": "/etc/silk/container-ca.key"}))
	write(t, "/etc/silk/daemon.json", of(client, map[string]any{"underlay_ip": underlay, "connectivity_server_url": controller}))
	write(t, "/etc/silk/policy-server.json", of(server, map[string]any{"listen_port": 4002, "enable_tls": true, "internal_listen_port": 4003, "token_file": "/etc/silk/tokens.json"}))
	write(t, "/etc/silk/tokens.json", map[string]any{"tokens": []any{map[string]any{"name": "vm", "admin": true, "sha256": fmt.Sprintf("%x", sha256.Sum256([]byte("secret")))}}})
	write(t, "/etc/silk/policy-agent.json", of(client, map[string]any{"underlay_ips": []string{underlay}, "policy_server_url": "https://" + underlay + ":4003", "dns_servers": []string{"169.254.0.2"}}))
	write(t, "/etc/silk/dns.json", map[string]any{"domains": []string{"apps.internal"}, "endpoint_dir": "/run/silk/endpoints", "listen_dns": []string{"169.254.0.2:53", "127.0.0.2:53"}})
	proxy := of(client, map[string]any{"certificates": "authority", "underlay_ip": underlay, "connectivity_server_url": controller})
	if os.Getenv("SILK_VM") == "tcg" { // which may stand still for longer than a client or an application may
		proxy["connect_timeout_milliseconds"], proxy["handshake_timeout_seconds"] = 20_000, 120
	}
	write(t, "/etc/silk/tls.json", proxy)
}

// unitsStart: every unit comes up, and systemd has nothing to say of any.
func unitsStart(t *testing.T) {
	if out := run(t, "cd /etc/systemd/system; systemd-analyze verify silk-*.service silk-dns.socket policy-server.service vxlan-policy-agent.service"); out != "" {
		t.Errorf("systemd-analyze verify: %s", out)
	}
	configure(t)
	run(t, "systemctl enable silk-dns-resolved %s", strings.Join(units, " "))
	for _, u := range units {
		start := time.Now()
		run(t, "systemctl start %s", u)
		if url, ok := health[u]; ok {
			await(t, u+" is healthy", func() bool { _, ok := get(url); return ok })
		}
		t.Logf("%s: %s after %v", u, run(t, "systemctl show -P ActiveState %s", u), time.Since(start).Round(time.Millisecond))
	}
	await(t, "the host is on the fabric", func() bool {
		body, _ := get("127.0.0.1:23954/v1/network")
		return strings.Contains(body, `"status":"ready"`)
	})
	sound(t)
}

// sound fails the test when a unit is not active or ended by itself, and shows what they warned of.
func sound(t *testing.T) {
	t.Helper()
	for _, u := range units {
		if s := run(t, "systemctl show -P NRestarts -P ActiveState %s | xargs", u); s != "0 active" && s != "active" {
			t.Errorf("%s: %s", u, s)
		}
	}
	if failed := run(t, "systemctl --failed --plain --no-legend"); failed != "" {
		t.Errorf("failed units: %s", failed)
	}
	t.Logf("warnings:\n%s", run(t, `journal=$(journalctl -b -o cat -u 'silk-*' -u 'vxlan-*' -u 'policy-*'); grep -E '"level":"(WARN|ERROR|warn|error)"' <<<"$journal" || :`))
}

// connectionTableIsSized: the daemon does so though its unit takes most capabilities from it.
func connectionTableIsSized(t *testing.T) {
	await(t, "nf_conntrack_max is raised", func() bool { // beyond what the kernel says by itself
		size, err := strconv.Atoi(run(t, "sysctl -n net.netfilter.nf_conntrack_max"))
		return err == nil && size > 262144
	})
	t.Log(run(t, "sysctl net.netfilter.nf_conntrack_max"))
}

// hostFindsNames by systemd-resolved, and goes on to when services are restarted, units read again, and the device made anew.
func hostFindsNames(t *testing.T) {
	api := attach(t, "api", "api")
	for _, after := range []string{
		":", "systemctl daemon-reload", "systemctl restart systemd-resolved", "systemctl restart systemd-networkd", "systemctl restart silk-dns",
		"ip link delete silk-vtep", "udevadm trigger -s net -w",
	} {
		run(t, "%s", after)
		await(t, "a name is found after "+after, func() bool {
			out, err := exec.Command("resolvectl", "query", "--cache=no", "api.apps.internal").CombinedOutput()
			return err == nil && strings.Contains(string(out), api.address.String()+" ") && strings.Contains(string(out), "silk-vtep")
		})
	}
	await(t, "no job waits", func() bool { return run(t, "systemctl list-jobs --no-legend") == "" })
	if s := run(t, "systemctl is-active silk-dns-resolved"); s != "active" {
		t.Errorf("silk-dns-resolved: %s", s)
	}
}

// unitsComeBack after SIGKILL. How fast is judged on a machine that is not emulated.
func unitsComeBack(t *testing.T) {
	api := attach(t, "api", "api")
	listens := func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		c, err := tcp.Dial(ctx, api.ns, netip.AddrPortFrom(api.address, 61443))
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	await(t, "silk-tls listens in the container", listens)
	for u, url := range health {
		pid := run(t, "systemctl show -P MainPID %s", u)
		back := func() bool { _, ok := get(url); return ok }
		if u == "silk-tls" {
			back = listens
		}
		start := time.Now()
		run(t, "kill -KILL %s", pid)
		if u == "silk-dns" { // the question waits in the socket that systemd holds
			if a := run(t, "ip netns exec api dig +tries=1 +timeout=60 +short @169.254.0.2 api.apps.internal"); a != api.address.String() {
				t.Errorf("while silk-dns is away: %q", a)
			}
		}
		testkit.Until(t, patience, u+" is back", back)
		took := time.Since(start)
		t.Logf("%s answers again after %v", u, took.Round(time.Millisecond))
		if (u == "silk-tls" || u == "silk-dns") && took > time.Second && os.Getenv("SILK_VM") == "kvm" {
			t.Errorf("%s was away for %v", u, took)
		}
		if now, starts := run(t, "systemctl show -P MainPID %s", u), run(t, "systemctl show -P NRestarts %s", u); now == pid || starts != "1" {
			t.Errorf("%s is process %s after %s restarts, and was %s", u, now, starts, pid)
		}
		run(t, "systemctl reset-failed %s", u)
	}
}

// unitsStop: each ends when it is told to, and what is in the kernel stays.
func unitsStop(t *testing.T) {
	api, web := attach(t, "api", "api"), attach(t, "web", "web")
	api.echo(t)
	run(t, "silk policy add web api --ports 8080 --wait --timeout 60s")
	for _, u := range slices.Backward(units) {
		start := time.Now()
		run(t, "systemctl stop %s", u)
		t.Logf("%s: %s after %v", u, run(t, "systemctl show -P ActiveState -P Result %s | xargs", u), time.Since(start).Round(time.Millisecond))
		if s := run(t, "systemctl is-failed %s || :", u); s != "inactive" {
			t.Errorf("%s: %s", u, s)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, err := tcp.Dial(ctx, web.ns, netip.AddrPortFrom(api.address, 8080))
	if err == nil {
		defer c.Close()
		err = answers(c)
	}
	if err != nil {
		t.Errorf("what a policy allows, with all programs stopped: %v", err)
	}
}
