package lab_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lab"
	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

// named builds a lab whose containers have names and in which policy is required, and waits until it is whole.
func named(t *testing.T, o lab.Options) (*lab.Lab, lab.Status) {
	t.Helper()
	_, err := exec.LookPath("nats-server")
	testkit.Require(t, "nats", err)
	for _, p := range []string{"dig", "curl"} {
		_, err := exec.LookPath(p)
		testkit.Require(t, "tools", err)
	}
	o.Names = true
	return policed(t, o)
}

// resolver is where every container asks for names.
const resolver = "169.254.0.2:53"

// client asks a container's resolver from within the container's network, once for each question: nothing is tried again behind a test's back.
type client struct{ ns *kernel.NS }

func clientOf(t *testing.T, s lab.Status, container_ string) client {
	t.Helper()
	return client{nsOf(t, container(t, s, container_).Responder.PID)}
}

func (c client) ask(name string, typ uint16, timeout time.Duration) (*dns.Msg, error) {
	var conn net.Conn
	err := c.ns.Do(func() (err error) { conn, err = net.DialTimeout("udp4", resolver, timeout); return err })
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	q := new(dns.Msg).SetQuestion(dns.Fqdn(name), typ)
	conn.SetDeadline(time.Now().Add(timeout))
	co := &dns.Conn{Conn: conn}
	if err := co.WriteMsg(q); err != nil {
		return nil, err
	}
	m, err := co.ReadMsg()
	if err == nil && m.Id != q.Id {
		err = errors.New("the answer is to another question")
	}
	return m, err
}

// addresses returns the sorted addresses of a name. An answer that says that there is none is an error.
func (c client) addresses(name string, timeout time.Duration) ([]string, error) {
	m, err := c.ask(name, dns.TypeA, timeout)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, rr := range m.Answer {
		if a, ok := rr.(*dns.A); ok {
			all = append(all, a.A.String())
		}
	}
	slices.Sort(all)
	if m.Rcode != dns.RcodeSuccess {
		return all, errors.New(dns.RcodeToString[m.Rcode])
	}
	return all, nil
}

// of returns the sorted addresses of containers.
func of(t *testing.T, s lab.Status, names ...string) []string {
	t.Helper()
	var all []string
	for _, n := range names {
		all = append(all, container(t, s, n).Address.String())
	}
	slices.Sort(all)
	return all
}

// output runs a command in a place of the lab and expects it to succeed.
func output(t *testing.T, l *lab.Lab, where string, command ...string) string {
	t.Helper()
	out, err := l.Output(t.Context(), where, command...)
	if err != nil {
		t.Fatalf("%s: %q: %v\n%s", where, command, err, out)
	}
	return string(out)
}

// TestContainersFindEachOther: c1, c3 and c5 are web, c2, c4 and c6 are api, two on each host.
func TestContainersFindEachOther(t *testing.T) {
	t.Parallel()
	l, s := named(t, lab.Options{})
	all := of(t, s, "c2", "c4", "c6")
	for _, from := range []string{"c1", "c4"} {
		dig := func(args ...string) []string {
			t.Helper()
			out := strings.Fields(output(t, l, from, append([]string{"dig", "+short"}, args...)...))
			slices.Sort(out)
			return out
		}
		for _, q := range []struct {
			args []string
			want []string
		}{
			{[]string{"api.apps.internal"}, all}, {[]string{"API.Apps.Internal."}, all}, {[]string{"+tcp", "api.apps.internal"}, all}, {[]string{"+noedns", "api.apps.internal"}, all},
			{[]string{"1.api.apps.internal"}, of(t, s, "c4")}, {[]string{"c5.apps.internal"}, of(t, s, "c5")}, {[]string{"AAAA", "api.apps.internal"}, nil},
			{[]string{"-x", container(t, s, "c6").Address.String()}, nil},
		} {
			got := append([]string(nil), dig(q.args...)...)
			if q.args[0] == "-x" { // it is called by several names
				if !slices.Contains(got, "c6.apps.internal.") {
					t.Errorf("%s: dig %q: %q", from, q.args, got)
				}
			} else if diff := cmp.Diff(q.want, got); diff != "" {
				t.Errorf("%s: dig %q (-want +got):\n%s", from, q.args, diff)
			}
		}
		header := func(status string, args ...string) {
			t.Helper()
			await(t, "the answer to "+args[0], func() error { // until its resolver has heard all that there is, it does not deny
				if out := output(t, l, from, append([]string{"dig", "+nocookie"}, args...)...); !strings.Contains(out, "status: "+status+",") {
					return fmt.Errorf("%s: dig %q, expected %s:\n%s", from, args, status, out)
				}
				return nil
			})
		}
		header("NOERROR", "api.apps.internal", "AAAA")
		header("NXDOMAIN", "nobody.apps.internal", "A")
		header("NXDOMAIN", "nobody.apps.internal", "AAAA")
		header("NXDOMAIN", "9.api.apps.internal", "A")
		header("REFUSED", "example.com", "A")
		srv := dig("SRV", "api.apps.internal")
		if len(srv) != 12 || srv[0] != "0" {
			t.Errorf("%s: SRV records %q, expected three of four words", from, srv)
		}
		for _, want := range []string{strconv.Itoa(lab.HTTPPort)} {
			if n := len(srv) - len(slices.DeleteFunc(slices.Clone(srv), func(w string) bool { return w == want })); n != 3 {
				t.Errorf("%s: SRV records %q name port %s %d times, want 3", from, srv, want, n)
			}
		}
		if out := output(t, l, from, "cat", "/etc/resolv.conf"); !strings.Contains(out, "nameserver 169.254.0.2\n") {
			t.Errorf("the resolv.conf of %s is %q", from, out)
		}
	}
	if out := output(t, l, "host1", "cat", "/etc/resolv.conf"); out != "" {
		t.Errorf("the resolv.conf of host1 is %q", out)
	}
	ended := make(chan error, 1)
	r, w, err := os.Pipe()
	do(t, err)
	go func() { // in mounts of its own, for its resolver
		_, err := l.Exec(t.Context(), "c6", []string{"sh", "-c", "echo started; exec sleep 1000"}, r, w, w)
		ended <- err
	}()
	if _, err := r.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	do(t, l.Kill(t.Context(), "host3"))
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("a command in a container lives on after its host lost power")
	}
	r.Close()
	w.Close()
}

// TestNoLookupFailsWhileNATSIsAway kills nats-server again and again under two streams of lookups, keeps it away while containers come, and has their
// names known everywhere when it is back.
func TestNoLookupFailsWhileNATSIsAway(t *testing.T) {
	t.Parallel()
	l, s := named(t, lab.Options{Hosts: 2})
	names := map[string][]string{"api.apps.internal": of(t, s, "c2", "c4"), "web.apps.internal": of(t, s, "c1", "c3"), "1.api.apps.internal": of(t, s, "c4"), "c1.apps.internal": of(t, s, "c1")}
	streams := []*stream{startStream(t, s, "c1", 1, time.Second, names), startStream(t, s, "c4", 1, time.Second, names)}
	pid := program(t, s, "nats-server").PID
	for range 3 {
		do(t, l.Kill(t.Context(), "nats-server"))
		eventually(t, l, "nats-server comes back", func(s lab.Status) bool {
			p := program(t, s, "nats-server").PID
			return p != 0 && p != pid
		})
		s = whole(t, l)
		pid = program(t, s, "nats-server").PID
	}
	restore := hide(t, l, "nats-server")
	do(t, l.Kill(t.Context(), "nats-server"))
	_, err := l.AddTo(t.Context(), "late", "host1", "shop")
	do(t, err)
	eventually(t, l, "its own host knows the new container", func(s lab.Status) bool {
		return slices.ContainsFunc(s.Names, func(n lab.Name) bool {
			return n.Name == "shop.apps.internal" && slices.Equal(n.Missing, []string{"host2"})
		})
	})
	for _, other := range []string{"host2/silk-daemon", "host2/vxlan-policy-agent", "host2/silk-tls", "controller", "policy-server"} {
		do(t, l.Kill(t.Context(), other)) // what has nothing to do with names changes nothing about them
	}
	restore()
	whole(t, l)
	for i, st := range streams {
		n, bad := st.end()
		if len(bad) > 0 {
			t.Errorf("stream %d: %d of %d lookups failed: %q", i, len(bad), n, bad[:min(len(bad), 5)])
		}
		if n < 500 {
			t.Errorf("stream %d: only %d lookups", i, n)
		}
		t.Logf("stream %d: %d lookups", i, n)
	}
}

// TestAKilledResolverAnswersFromItsSnapshot: lookups wait while it is restarted, and none fails for who asks again after a second, as containers' resolv.conf
// says; nothing is forgotten, though NATS is away as well, and nobody gets a wrong answer.
func TestAKilledResolverAnswersFromItsSnapshot(t *testing.T) {
	t.Parallel()
	l, s := named(t, lab.Options{Hosts: 2})
	names := map[string][]string{"api.apps.internal": of(t, s, "c2", "c4"), "c3.apps.internal": of(t, s, "c3")}
	await(t, "host1 has saved what it knows", func() error { return savedName(l, "host1", "c3.apps.internal") })
	restore := hide(t, l, "nats-server")
	do(t, l.Kill(t.Context(), "nats-server"))
	streams := map[string]*stream{
		"a client on host1": startStream(t, s, "c1", 5, time.Second, names), "one on host2": startStream(t, s, "c4", 1, time.Second, names),
	}
	hasty := startStream(t, s, "c2", 1, 20*time.Millisecond, names) // which shows for how long there is no answer
	library := startPatient(t, l, "c1", "c3.apps.internal")
	for range 3 {
		before := host(t, s, "host1").Resolver.PID
		do(t, l.Kill(t.Context(), "host1/silk-dns"))
		s = eventually(t, l, "host1 answers again", func(s lab.Status) bool {
			return host(t, s, "host1").Resolver.PID != before && host(t, s, "host1").Naming != lab.NoAnswer
		})
	}
	for who, st := range streams {
		n, bad := st.end()
		if t.Logf("%s: %d lookups, %d failed", who, n, len(bad)); len(bad) > 0 || n == 0 {
			t.Errorf("%s: %d of %d lookups failed: %q", who, len(bad), n, bad[:min(len(bad), 5)])
		}
	}
	n, bad := hasty.end()
	for _, b := range bad {
		if !strings.Contains(b, "timeout") {
			t.Errorf("host1 refuses or answers wrongly: %s", b)
		}
	}
	if t.Logf("without an answer within 20 ms: %d of %d lookups, for %v on end", len(bad), n, hasty.pauses()); len(bad) == 0 || len(bad) == n {
		t.Errorf("%d of %d lookups had no answer at once", len(bad), n)
	}
	if p := hasty.pauses(); len(p) > 0 && slices.Max(p) > 3*time.Second {
		t.Errorf("there was no answer for %v on end", p)
	}
	if out, err := library(); err != nil {
		t.Errorf("a client of the C library: %v\n%s", err, out)
	}
	restore()
	whole(t, l)
}

// savedName reports, as an error, that a host's snapshot lacks a name.
func savedName(l *lab.Lab, host, name string) error {
	b, err := os.ReadFile(filepath.Join(l.Dir(), "nodes", host, "dns-state/names"))
	if err == nil && !strings.Contains(string(b), name) {
		err = fmt.Errorf("no %s in %d bytes", name, len(b))
	}
	return err
}

// startPatient has a container look a name up again and again by the C library's resolver, with the options that the container got, a tenth of a
// second apart, until what it returns is called, which reports the first failure.
func startPatient(t *testing.T, l *lab.Lab, from, name string) (stop func() (string, error)) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "go")
	do(t, os.WriteFile(file, nil, 0o600))
	type result struct {
		out []byte
		err error
	}
	ended := make(chan result, 1)
	go func() {
		out, err := l.Output(t.Context(), from, "sh", "-c", fmt.Sprintf("while test -e %s; do getent ahostsv4 %s >/dev/null || { date +%%T.%%N; exit 1; }; sleep 0.1; done", file, name))
		ended <- result{out, err}
	}()
	return func() (string, error) {
		os.Remove(file)
		r := <-ended
		return string(r.out), r.err
	}
}

// TestAContainerThatGoesHasNoNameAnywhere after 2 s. Those of a host that lost power have theirs again when it is back.
func TestAContainerThatGoesHasNoNameAnywhere(t *testing.T) {
	t.Parallel()
	l, s := named(t, lab.Options{Hosts: 3})
	clients := map[string]client{"host1": clientOf(t, s, "c1"), "host2": clientOf(t, s, "c3"), "host3": clientOf(t, s, "c5")}
	for i := range 3 {
		name := fmt.Sprintf("brief%d", i)
		address, err := l.AddTo(t.Context(), name, "host1", "api")
		do(t, err)
		for h, c := range clients {
			await(t, h+" knows "+name, func() error {
				got, err := c.addresses(name+".apps.internal", time.Second)
				if err == nil && !slices.Equal(got, []string{address.String()}) {
					err = fmt.Errorf("got %v, want %v", got, address)
				}
				return err
			})
		}
		do(t, l.Remove(t.Context(), name))
		gone := time.Now()
		for h, c := range clients {
			await(t, h+" has forgotten "+name, func() error {
				m, err := c.ask(name+".apps.internal", dns.TypeA, time.Second)
				if err == nil && m.Rcode != dns.RcodeNameError {
					err = fmt.Errorf("the answer is %v", m)
				}
				return err
			})
			if got, err := c.addresses("api.apps.internal", time.Second); err != nil || slices.Contains(got, address.String()) {
				t.Errorf("%s: api is still at %v: %v, %v", h, address, got, err)
			}
		}
		if took := time.Since(gone); took > 2*time.Second {
			t.Errorf("all hosts have forgotten %s after %v, want 2 s", name, took)
		} else {
			t.Logf("forgotten everywhere after %v", took.Round(time.Millisecond))
		}
	}
	gone := of(t, s, "c5", "c6")
	do(t, l.Remove(t.Context(), "host3"))
	got, err := clients["host1"].addresses("api.apps.internal", time.Second)
	for _, a := range gone {
		if err != nil || slices.Contains(got, a) {
			t.Errorf("api is still at %s of a host that left: %v, %v", a, got, err)
		}
	}
	do(t, l.Kill(t.Context(), "host2"))
	s = whole(t, l)
	if got, err := clients["host1"].addresses("api.apps.internal", time.Second); err != nil || !slices.Equal(got, of(t, s, "c2", "c4")) {
		t.Errorf("after a power cut of host2 api is %v, %v, want %v", got, err, of(t, s, "c2", "c4"))
	}
	if got := output(t, l, "c3", "dig", "+short", "c1.apps.internal"); strings.TrimSpace(got) != container(t, s, "c1").Address.String() {
		t.Errorf("in a container of host2 c1 is %q", got)
	}
}

// TestNamesLeaveNothing: after silk-teardown a host is as it was before anything of Silk's ran on it.
func TestNamesLeaveNothing(t *testing.T) {
	t.Parallel()
	l, _ := named(t, lab.Options{Hosts: 2})
	all := []string{"silk-daemon", "vxlan-policy-agent", "silk-dns", "silk-tls"}
	dump := func() string {
		return output(t, l, "host1", "sh", "-ec", `ip -o link | sed 's/^[0-9]*: //' | cut -d' ' -f1 | sort; ip -o addr | sed 's/^[0-9]*: //' | grep -v inet6 | sort
			ip route show table all | grep -v -w -e ff00::/8 -e fe80 | sort; ip rule; nft list ruleset`)
	}
	// At first nothing may run on the host: it has lost power, and none of the programs is there.
	var back []func()
	for _, p := range append(all, "silk-cni") {
		back = append(back, hide(t, l, p))
	}
	do(t, l.Kill(t.Context(), "host1"))
	eventually(t, l, "host1 is there again, and nothing on it", func(s lab.Status) bool { return host(t, s, "host1").State == lab.NoAnswer })
	var before string
	await(t, "host1 can be looked at", func() (err error) {
		out, err := l.Output(t.Context(), "host1", "ip", "-o", "addr", "show", "dev", "eth0")
		if err == nil && !strings.Contains(string(out), "10.0.0.11") {
			err = fmt.Errorf("its address is not there: %s", out)
		}
		return err
	})
	before = dump()
	for _, f := range back {
		f()
	}
	whole(t, l)
	for _, c := range []string{"c1", "c2"} {
		do(t, l.Remove(t.Context(), c))
	}
	for _, p := range all {
		hide(t, l, p)
		do(t, l.Kill(t.Context(), "host1/"+p))
	}
	output(t, l, "host1", filepath.Join(programs, "silk-teardown"), "-config", filepath.Join(l.Dir(), "nodes/host1/daemon.json"))
	if diff := cmp.Diff(before, dump()); diff != "" {
		t.Errorf("host1 before, and after silk-teardown (-before +after):\n%s", diff)
	}
}

// TestNamesNeedNATS: without nats-server the package is named, before anything is built.
func TestNamesNeedNATS(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "lab")
	cmd := exec.Command("unshare", "--mount", "sh", "-ec", `
		for d in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
			if test -x $d/nats-server; then mount --bind /dev/null $d/nats-server; fi
		done
		exec "$SILK" lab --dir "$DIR" up --names`)
	cmd.Env = append(os.Environ(), "SILK="+filepath.Join(programs, "silk"), "DIR="+dir)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "apt-get install nats-server") {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was built: %v", err)
	}
}

// TestGroupsWithoutANameAreRefused: what no name can be made of.
func TestGroupsWithoutANameAreRefused(t *testing.T) {
	t.Parallel()
	l, _ := named(t, lab.Options{Hosts: 1, Containers: 1})
	if _, err := l.AddTo(t.Context(), "x", "host1", "no/name"); !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), "no/name") {
		t.Errorf("group no/name: %v, want fault.Invalid", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := l.AddTo(ctx, "x", "host1", "a.b"); err != nil {
		t.Errorf("group a.b: %v", err)
	}
	if got := strings.TrimSpace(output(t, l, "c1", "dig", "+short", "0.a.b.apps.internal")); got == "" {
		t.Error("instance 0 of a.b has no address")
	}
}
