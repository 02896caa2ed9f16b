package policyhttp_test

import (
	"errors"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
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
