package dns_test

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// resolved returns the programs of systemd-resolved. The package of that name takes over the resolver of the machine it is installed on: packaging/install-deps only
// unpacks it.
func resolved(t testing.TB) (server, bin string) {
	t.Helper()
	for _, root := range []string{"/var/cache/silk-test/systemd-resolved", "/"} {
		for _, lib := range []string{"lib", "usr/lib"} {
			server = filepath.Join(root, lib, "systemd/systemd-resolved")
			if _, err := os.Stat(server); err == nil {
				return server, filepath.Join(root, "usr/bin")
			}
		}
	}
	testkit.Require(t, "resolved", fs.ErrNotExist)
	return "", ""
}

// upstream is the resolver of the machine's own network: it answers everything and notes what it was asked.
func upstream(t testing.TB, ns *kernel.NS, address string) (asked func() []string) {
	t.Helper()
	var mu sync.Mutex
	var names []string
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		mu.Lock()
		names = append(names, q.Question[0].Name)
		mu.Unlock()
		m := new(dns.Msg).SetReply(q)
		if q.Question[0].Qtype == dns.TypeA {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(9, 9, 9, 9)})
		}
		w.WriteMsg(m)
	})
	var pc net.PacketConn
	if err := ns.Do(func() (err error) {
		pc, err = net.ListenPacket("udp4", address)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s := &dns.Server{PacketConn: pc, Handler: h}
	done := make(chan struct{})
	go func() { defer close(done); s.ActivateAndServe() }()
	t.Cleanup(func() { pc.Close(); <-done })
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(names)
	}
}

// setting returns what the packaged unit runs.
func setting(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("../packaging/resolved/silk-dns-resolved.service")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		if c, ok := strings.CutPrefix(strings.TrimSpace(line), "ExecStart="); ok {
			lines = append(lines, "set -- "+strings.ReplaceAll(c, "~", `\~`)+`; "$@"`)
		}
	}
	return strings.Join(lines, "\n")
}

// TestRoutedDomainOfResolved: with the packaged unit, systemd-resolved asks silk-dns for our names and nobody else, and others for all else and not us.
func TestRoutedDomainOfResolved(t *testing.T) {
	server, bin := resolved(t)
	if os.Getuid() != 0 {
		testkit.Require(t, "root", errors.New("not run by root"))
	}
	h, beyond := newHost(t), netns.New(t)
	r, _ := h.attach("one", endpoint.Advertisement{Names: []string{"api.apps.internal"}})
	h.run("ip link add eth0 type veth peer name eth0 netns " + fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), beyond.FD()))
	host{t, beyond, nil}.run("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up")
	h.run("ip addr add 10.9.0.1/24 dev eth0; ip link set eth0 up; ip link add silk-vtep type vxlan id 1 dstport 4789 dev eth0; ip addr add 10.255.30.0/16 dev silk-vtep scope link; ip link set silk-vtep up")
	asked := upstream(t, beyond, "10.9.0.2:53")
	h.launch(settings(t, object{"endpoint_dir": h.dir.Path(), "listen_dns": []string{"169.254.0.2:53", "127.0.0.2:53"}}))

	cmd := exec.Command("unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc", "bash", "testdata/resolved.sh")
	cmd.Env = append(os.Environ(), "SERVER="+server, "DIR="+t.TempDir(), "COMMANDS="+setting(t), "PATH="+bin+":"+os.Getenv("PATH"))
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := h.ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Log(said.String())
		}
	})
	ready := make(chan bool, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		ready <- line == "ready\n"
	}()
	select {
	case ok := <-ready:
		if !ok {
			t.Fatal("systemd-resolved is not set up")
		}
	case <-time.After(time.Minute):
		t.Fatal("systemd-resolved does not start")
	}
	stub := &process{DNS: []string{"127.0.0.53:53"}}
	h.names(stub, soon, "api.apps.internal", "NOERROR "+r.Address().String())
	h.names(stub, soon, "other.apps.internal", "NXDOMAIN")
	for i := range 20 {
		h.names(stub, soon, fmt.Sprintf("www%d.example.com", i), "NOERROR 9.9.9.9") // REFUSED would be ours
	}
	for _, name := range asked() {
		if strings.HasSuffix(name, "apps.internal.") {
			t.Errorf("the network's resolver was asked for %s", name)
		}
	}
	if len(asked()) < 20 {
		t.Errorf("the network's resolver was asked for %v only", asked())
	}
}
