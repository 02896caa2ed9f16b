// Package vm has what only a machine of its own can show: the packaged units under systemd, and more connections than a
// process may hold on machines that bound its descriptors. packaging/vm/run makes such a machine and runs these tests there,
// as root of a fresh system with networkd and resolved, in the order in which they stand here.
package vm

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/kernel/tcp"
)

const (
	patience = 4 * time.Minute // an emulated machine is slow
	underlay = "10.0.16.5"     // which packaging/vm/run gives the machine
)

// units are what docs/operate has on one host that is controller, policy server and host of containers.
var units = []string{"silk-controller", "silk-daemon", "policy-server", "vxlan-policy-agent", "silk-dns.socket", "silk-dns", "silk-tls"}

// health is where each answers.
var health = map[string]string{
	"silk-controller": "127.0.0.1:19683/health", "silk-daemon": "127.0.0.1:23954/health", "policy-server": "127.0.0.1:31946/health",
	"vxlan-policy-agent": "127.0.0.1:8721/health", "silk-dns": "127.0.0.1:8056/health", "silk-tls": "127.0.0.1:8057/health",
}

func TestMain(m *testing.M) {
	os.Setenv("SILK_POLICY_SERVER", "https://"+underlay+":4002")
	os.Setenv("SILK_POLICY_CA", "/etc/silk/ca.crt")
	os.Setenv("SILK_POLICY_TOKEN", "secret")
	os.Exit(m.Run())
}

// TestMachine is all of it, one after the other.
func TestMachine(t *testing.T) {
	if os.Getenv("SILK_VM") == "" {
		t.Skip("packaging/vm/run makes the machine that this is for")
	}
	for _, f := range []struct {
		name string
		do   func(*testing.T)
	}{
		{"UnitsStart", unitsStart}, {"ConnectionTableIsSized", connectionTableIsSized}, {"TenThousandConnections", tenThousandConnections},
		{"HostFindsNames", hostFindsNames}, {"UnitsComeBack", unitsComeBack}, {"UnitsStop", unitsStop},
	} {
		if !t.Run(f.name, f.do) {
			t.Logf("the journal's last lines:\n%s", run(t, "journalctl -b -o short-precise --no-pager -n 80"))
		}
	}
}

// run returns what a command says.
func run(t *testing.T, command string, args ...any) string {
	t.Helper()
	line := fmt.Sprintf(command, args...)
	out, err := exec.Command("bash", "-euo", "pipefail", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// get returns what url answers with status 200.
func get(url string) (body string, ok bool) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + url)
	if err != nil {
		return "", false
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err == nil && resp.StatusCode == http.StatusOK
}

// await is for what takes seconds, on a machine that is not to be kept busy by looking.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

func write(t *testing.T, path string, content any) {
	t.Helper()
	b, err := json.Marshal(content)
	if err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// container is one that silk-cni attached: a namespace below /run/netns.
type container struct {
	id      string
	ns      *kernel.NS
	address netip.Addr
}

func (c container) cni(t *testing.T, command, group string) string {
	t.Helper()
	conf := `{"cniVersion":"1.0.0","name":"silk","type":"silk-cni","daemonPort":23954,"policy":"required","policy_group":"${args.APP}","policy_timeout_seconds":50,
		"advertise":{"group":true},"tls":[{}],"dns":{"nameservers":["169.254.0.2"]}}`
	return run(t, "CNI_COMMAND=%s CNI_CONTAINERID=%s CNI_NETNS=/run/netns/%s CNI_IFNAME=eth0 CNI_PATH=/usr/bin CNI_ARGS='IgnoreUnknown=1;APP=%s' silk-cni <<<'%s'", command, c.id, c.id, group, conf)
}

func attach(t *testing.T, id, group string) container {
	t.Helper()
	run(t, "ip netns add %[1]s; ip -n %[1]s link set lo up", id)
	c := container{id: id}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if out := c.cni(t, "ADD", group); json.Unmarshal([]byte(out), &result) != nil || len(result.IPs) != 1 {
		t.Fatalf("ADD: %s", out)
	}
	var err error
	if c.ns, err = kernel.OpenNS("/run/netns/" + id); err != nil {
		t.Fatal(err)
	}
	c.address = result.IPs[0].Address.Addr()
	t.Cleanup(func() { c.detach(t) })
	return c
}

// detach takes the container away as a runtime does.
func (c container) detach(t *testing.T) {
	t.Helper()
	c.ns.Close()
	c.cni(t, "DEL", "")
	run(t, "ip netns del %[1]s 2>/dev/null || [ ! -e /run/netns/%[1]s ]", c.id)
}

// echo is the container's application.
func (c container) echo(t *testing.T) {
	t.Helper()
	l, err := tcp.Listen(c.ns, netip.AddrPortFrom(c.address, 8080), 4096)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(a, a); a.Close() }()
		}
	}()
}

func roots(t *testing.T) *x509.CertPool {
	t.Helper()
	b, err := os.ReadFile("/var/lib/silk/tls/roots/roots.pem")
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(b) {
		t.Fatalf("roots: %v", err)
	}
	return pool
}

// dial connects to the container's TLS port and has a byte sent back.
func (c container) dial(to container, cfg *tls.Config) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	raw, err := tcp.Dial(ctx, c.ns, netip.AddrPortFrom(to.address, 61443))
	if err != nil {
		return nil, err
	}
	s := tls.Client(raw, cfg)
	if err := s.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	if err := answers(s); err != nil {
		raw.Close()
		return nil, err
	}
	return s, nil
}

func answers(s net.Conn) error {
	s.SetDeadline(time.Now().Add(30 * time.Second))
	defer s.SetDeadline(time.Time{})
	if _, err := s.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(s, make([]byte, 1))
	return err
}
