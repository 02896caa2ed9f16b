package policyhttp_test

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

var (
	peerSource      = netip.MustParseAddrPort("10.255.30.2:41000")
	peerDestination = netip.MustParseAddrPort("10.255.30.3:61443")
)

// TestPeerAnswersThatAreNone: what an agent may answer instead of a peer.
func TestPeerAnswersThatAreNone(t *testing.T) {
	answer, status := "", 200
	l, err := net.Listen("unix", policyhttp.PeerSocket(1))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if got := r.URL.RequestURI(); got != "/peer?destination=10.255.30.3%3A61443&protocol=tcp&source=10.255.30.2%3A41000" {
			t.Errorf("asked %s", got)
		}
		w.WriteHeader(status)
		w.Write([]byte(answer))
	})}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	t.Cleanup(func() { s.Close(); <-done })
	c := policyhttp.NewPeerClient(1, 5*time.Second)
	defer c.Close()
	for _, tt := range []struct {
		status int
		answer string
		want   error
	}{
		{200, `{"tag":"0012","group":"web"}`, nil},
		{200, `{"group":"web"}`, fault.Unavailable},
		{200, `{"tag":"0012","group":""}`, fault.Unavailable},
		{404, `{"error": "no tag"}`, fault.NotFound},
		{503, ``, fault.Unavailable},
	} {
		status, answer = tt.status, tt.answer
		p, err := c.Peer(t.Context(), peerSource, peerDestination, policy.TCP)
		if !errors.Is(err, tt.want) || (err == nil) != (p.Group == "web" && p.Tag == 0x12) {
			t.Errorf("%d %s: %+v, %v, want %v", tt.status, tt.answer, p, err, tt.want)
		}
	}
}

// TestPeersOfAnotherUser: who takes the socket while the agent is away is not believed.
func TestPeersOfAnotherUser(t *testing.T) {
	if os.Getenv("PEER_IMPOSTOR") != "" {
		l, err := net.Listen("unix", policyhttp.PeerSocket(2))
		if err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("listening\n")
		http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(`{"tag":"0012","group":"web"}`)) }))
		return
	}
	if os.Geteuid() != 0 {
		testkit.Require(t, "root", errors.New("another user can be one only for root"))
	}
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "peer") // where another user can go
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(dir+"/impostor", b, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(dir+"/impostor", "-test.run", "^TestPeersOfAnotherUser$")
	cmd.Env = append(os.Environ(), "PEER_IMPOSTOR=1")
	cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	c := policyhttp.NewPeerClient(2, 5*time.Second)
	defer c.Close()
	p, err := c.Peer(t.Context(), peerSource, peerDestination, policy.TCP)
	if !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "user 65534 listens") {
		t.Errorf("%+v, %v, want fault.Unavailable for the user", p, err)
	}
}
