package nat_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/nat"
)

// TestRedirect: connections of a container end at its proxy, except those of the proxy itself, and what comes in if that is wanted.
func TestRedirect(t *testing.T) {
	outside, inside := redirectWorld(t)
	serve := func(ns *kernel.NS, addr, name string) {
		t.Helper()
		var l net.Listener
		if err := ns.Do(func() (err error) { l, err = net.Listen("tcp4", addr); return err }); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, name)
				c.Close()
			}
		}()
	}
	serve(outside, "10.1.0.1:80", "outside")
	serve(outside, "10.2.0.1:80", "outside")
	serve(inside, "0.0.0.0:15001", "proxy")
	serve(inside, "0.0.0.0:8080", "app")
	ask := func(ns *kernel.NS, uid int, to string) string {
		t.Helper()
		var b []byte
		err := ns.Do(func() error {
			cmd := exec.Command("/bin/bash", "-c", `exec 3<>/dev/tcp/${0/:/\/} && cat <&3`, to)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid)}}
			var err error
			b, err = cmd.Output()
			return err
		})
		if err != nil {
			t.Fatalf("ask %s: %v", to, err)
		}
		return string(b)
	}
	set := func(r nat.Redirect) {
		t.Helper()
		for range 2 {
			if err := nat.SetRedirect(inside, r); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, r := range []struct {
		redirect                     nat.Redirect
		near, far, proxys, in, other string
	}{
		{nat.Redirect{}, "outside", "outside", "outside", "app", "proxy"},
		{nat.Redirect{To: netip.MustParsePrefix("10.2.0.0/16"), Port: 15001, Except: 65534}, "outside", "proxy", "outside", "app", "proxy"},
		{nat.Redirect{To: netip.MustParsePrefix("0.0.0.0/0"), Port: 15001, Except: 65534}, "proxy", "proxy", "outside", "app", "proxy"},
		{nat.Redirect{Incoming: true, Port: 15001}, "outside", "outside", "outside", "proxy", "proxy"},
		{nat.Redirect{}, "outside", "outside", "outside", "app", "proxy"},
	} {
		set(r.redirect)
		for _, q := range []struct {
			ns   *kernel.NS
			uid  int
			to   string
			want string
		}{
			{inside, 1000, "10.1.0.1:80", r.near}, {inside, 1000, "10.2.0.1:80", r.far}, {inside, 65534, "10.2.0.1:80", r.proxys},
			{outside, 0, "10.1.0.2:8080", r.in}, {outside, 0, "10.1.0.2:15001", r.other},
		} {
			if got := ask(q.ns, q.uid, q.to); got != q.want {
				t.Errorf("%+v: user %d asks %s: %s answers, want %s", r.redirect, q.uid, q.to, got, q.want)
			}
		}
	}
	if there := listRedirect(t, inside); there != "" {
		t.Errorf("left: %s", there)
	}
	set(nat.Redirect{To: netip.MustParsePrefix("10.2.0.0/16"), Incoming: true, Port: 15001, Except: 1})
	text := listRedirect(t, inside)
	for _, rule := range []string{"meta skuid != 1 ip daddr 10.2.0.0/16 meta l4proto 6 redirect to :15001", "type nat hook prerouting priority -100; policy accept;\n\t\tmeta l4proto 6 redirect to :15001"} {
		if !strings.Contains(text, rule) {
			t.Errorf("nft lists\n%s\nwithout %s", text, rule)
		}
	}
	if err := nat.SetRedirect(inside, nat.Redirect{To: netip.MustParsePrefix("fd00::/8"), Port: 1}); err == nil {
		t.Error("an IPv6 network was taken")
	}
}

func listRedirect(t *testing.T, ns *kernel.NS) string {
	t.Helper()
	_, err := exec.LookPath("nft")
	testkit.Require(t, "nft", err)
	var b []byte
	if err := ns.Do(func() (err error) { b, err = exec.Command("nft", "-n", "-y", "list", "ruleset").Output(); return err }); err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// redirectWorld returns two namespaces with a wire between them: 10.1.0.1 and 10.2.0.1, and 10.1.0.2.
func redirectWorld(t *testing.T) (outside, inside *kernel.NS) {
	t.Helper()
	var list []*kernel.NS
	for range 2 {
		ns, err := kernel.NewNS()
		testkit.Require(t, "netns", err)
		t.Cleanup(func() { ns.Close() })
		list = append(list, ns)
	}
	outside, inside = list[0], list[1]
	run := func(ns *kernel.NS, script string) {
		t.Helper()
		if err := ns.Do(func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			out, err := exec.CommandContext(ctx, "sh", "-ec", script).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	run(outside, fmt.Sprintf("ip link set lo up; ip link add v0 type veth peer name v1; ip link set v1 netns /proc/%d/fd/%d; ip addr add 10.1.0.1/24 dev v0; ip addr add 10.2.0.1/32 dev v0; ip link set v0 up", os.Getpid(), inside.FD()))
	run(inside, "ip link set lo up; ip addr add 10.1.0.2/24 dev v1; ip link set v1 up; ip route add default via 10.1.0.1")
	return outside, inside
}
