package lab_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/lab"
)

// fetch runs curl in a container and returns what it got. The certificate is verified by the lab's root alone.
func fetch(t *testing.T, l *lab.Lab, from, url string, args ...string) (string, error) {
	t.Helper()
	out, err := l.Output(t.Context(), from, append([]string{"curl", "-sS", "--max-time", "10", "--cacert", lab.ContainerRoot, url}, args...)...)
	return strings.TrimSpace(string(out)), err
}

// TestTLSNeedsAPolicyOfItsOwn: a policy for the port in clear opens none with TLS, and the reverse.
func TestTLSNeedsAPolicyOfItsOwn(t *testing.T) {
	t.Parallel()
	l, _ := named(t, lab.Options{Hosts: 2})
	clear, secure := "http://api.apps.internal:8080/", fmt.Sprintf("https://api.apps.internal:%d/", lab.TLSPort)
	expect := func(when, url string, open bool) {
		t.Helper()
		for range 6 { // both of its containers: one of the same host, one of the other
			got, err := fetch(t, l, "c1", url)
			switch {
			case open && (err != nil || got != "c2" && got != "c4"):
				t.Errorf("%s: %s: got %q, %v", when, url, got, err)
			case !open && err == nil:
				t.Errorf("%s: %s: got %q, want it refused", when, url, got)
			}
		}
	}
	expect("without a policy", clear, false)
	expect("without a policy", secure, false)
	allow(t, l, "web", "api", "--ports", "8080")
	expect("with one for 8080", clear, true)
	expect("with one for 8080", secure, false)
	forbid(t, l, "web", "api", "--ports", "8080")
	allow(t, l, "web", "api", "--ports", strconv.Itoa(lab.TLSPort))
	expect("with one for TLS", clear, false)
	expect("with one for TLS", secure, true)
	expect("an instance", fmt.Sprintf("https://1.api.apps.internal:%d/", lab.TLSPort), true)
	// Who is found by another name is not who was meant.
	address := output(t, l, "c1", "dig", "+short", "1.api.apps.internal")
	if got, err := fetch(t, l, "c1", fmt.Sprintf("https://web.apps.internal:%d/", lab.TLSPort), "--resolve", fmt.Sprintf("web.apps.internal:%d:%s", lab.TLSPort, strings.TrimSpace(address))); err == nil {
		t.Errorf("api passes for web: got %q", got)
	}
	if out, err := l.Output(t.Context(), "c1", "curl", "-sS", "--max-time", "10", "--cacert", filepath.Join(l.Dir(), "pki/ca.crt"), secure); err == nil {
		t.Errorf("verified by an authority that is not the containers': %s", out)
	}
}

// TestAKilledProxyListensAgainWithinASecond in every container of its host: the fastest of three times, since others use the machine as well.
func TestAKilledProxyListensAgainWithinASecond(t *testing.T) {
	t.Parallel()
	l, s := named(t, lab.Options{Hosts: 2, Containers: 4})
	var took []time.Duration
	for range 3 {
		old := host(t, s, "host1").Proxy.PID
		killed := time.Now()
		do(t, l.Kill(t.Context(), "host1/silk-tls"))
		await(t, "it has let go of its sockets", func() error {
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", old)); err == nil && len(b) > 0 {
				return errors.New("it lives")
			}
			return nil
		})
		for _, c := range []string{"c1", "c2", "c3", "c4"} {
			ns := nsOf(t, container(t, s, c).Responder.PID)
			await(t, c+" listens again", func() error {
				return ns.Do(func() error {
					conn, err := net.DialTimeout("tcp4", netip.AddrPortFrom(container(t, s, c).Address, lab.TLSPort).String(), time.Second)
					if err == nil {
						conn.Close()
					}
					return err
				})
			})
		}
		took = append(took, time.Since(killed))
		eventually(t, l, "the proxy is another process", func(s lab.Status) bool {
			p := host(t, s, "host1").Proxy.PID
			return p != 0 && p != old
		})
		s = whole(t, l)
	}
	if t.Logf("all listen again after %v", took); slices.Min(took) > time.Second {
		t.Errorf("all listen again after %v, want 1 s", took)
	}
	allow(t, l, "web", "api", "--ports", strconv.Itoa(lab.TLSPort))
	for _, to := range []string{"0.api", "1.api", "2.api", "3.api"} {
		if got, err := fetch(t, l, "c1", fmt.Sprintf("https://%s.apps.internal:%d/", to, lab.TLSPort)); err != nil {
			t.Errorf("%s: %q, %v", to, got, err)
		}
	}
}

// leafFiles has a host's intermediate sign a client certificate for an address and a group, and returns curl's arguments for it. No host would sign this
// for a container that is not its own, but one that was broken into can.
func leafFiles(t *testing.T, l *lab.Lab, host string, a netip.Addr, group identity.Group) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(l.Dir(), "nodes", host, "tls-state/intermediate.json"))
	do(t, err)
	var saved struct{ Key, Certificate string }
	do(t, json.Unmarshal(b, &saved))
	certs, err := authority.ParseCertificates([]byte(saved.Certificate))
	do(t, err)
	key, err := authority.ParseKey([]byte(saved.Key))
	do(t, err)
	i, err := authority.NewIntermediate(certs[0], key)
	do(t, err)
	leaf, err := i.Leaf(authority.Spec{Addresses: []netip.Addr{a}, Group: group}, time.Now())
	do(t, err)
	text, err := authority.EncodeKey(leaf.Key)
	do(t, err)
	dir := t.TempDir()
	cert, keyFile := filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
	do(t, os.WriteFile(cert, authority.EncodeCertificates(leaf.Chain()), 0o600))
	do(t, os.WriteFile(keyFile, text, 0o600))
	return []string{"--cert", cert, "--key", keyFile}
}

// TestBothEndsShowWhoTheyAre: a listener with client_auth lets in who shows a certificate of its own address and of the group that its packets are
// tagged with, from the same host and from another one.
func TestBothEndsShowWhoTheyAre(t *testing.T) {
	t.Parallel()
	l, s := named(t, lab.Options{Hosts: 2})
	allow(t, l, "web", "api", "--ports", strconv.Itoa(lab.MutualPort))
	c1, c3 := container(t, s, "c1").Address, container(t, s, "c3").Address
	for _, to := range []string{"c2", "c4"} { // of the same host, of the other
		url := fmt.Sprintf("https://%s.apps.internal:%d/", to, lab.MutualPort)
		for _, c := range []struct {
			what string
			args []string
			ok   bool
		}{
			{"its own", leafFiles(t, l, "host1", c1, "web"), true},
			{"none", nil, false},
			{"that of another container", leafFiles(t, l, "host2", c3, "web"), false},
			{"one of another group", leafFiles(t, l, "host1", c1, "api"), false},
		} {
			got, err := fetch(t, l, "c1", url, c.args...)
			if (err == nil) != c.ok || c.ok && got != to {
				t.Errorf("c1 to %s with a certificate, %s: got %q, %v, want it let in: %v", to, c.what, got, err, c.ok)
			}
		}
	}
}
