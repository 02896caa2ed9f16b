package cni_test

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// judging is the content of a policy table that judges, as far as the plugin asks.
const judging = "add chain inet silk-policy forward; add rule inet silk-policy forward drop; add chain inet silk-policy input; add rule inet silk-policy input drop"

// agent serves h's policy agent with answer, makes its table and returns its address.
func (h *host) agent(answer http.HandlerFunc) string {
	h.t.Helper()
	var l net.Listener
	err := h.ns.Do(func() (err error) {
		if l, err = net.Listen("tcp4", "127.0.0.1:0"); err == nil {
			err = exec.Command("nft", "add table inet silk-policy; "+judging).Run()
		}
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	s := &http.Server{Handler: answer}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	h.t.Cleanup(func() { s.Close(); <-done })
	return l.Addr().String()
}

func TestAddWaitsForTheContainersRules(t *testing.T) {
	h := newHost(t)
	asked := make(chan string, 1)
	address := h.agent(func(_ http.ResponseWriter, r *http.Request) { asked <- r.URL.String() })
	c := h.container("c1")
	if a := h.run("ADD", h.config("policy", "required", "policy_agent_force_poll_address", address), c.env("CNI_IFNAME", "e#&+5")); a.code != 0 || a.stderr != "" {
		t.Fatalf("%+v", a)
	}
	if got, want := <-asked, "/force-policy-poll-cycle?network=silk&container=c1&interface=e%23%26%2B5"; got != want {
		t.Errorf("the agent was asked for %q, want %q", got, want)
	}
}

// TestAddWithoutTheAgentIsClosedAndSaysSo: the agent's table refuses what is not known to be allowed.
func TestAddWithoutTheAgentIsClosedAndSaysSo(t *testing.T) {
	h := newHost(t)
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	refused := h.agent(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "its policies are not known", http.StatusServiceUnavailable)
	})
	slow := h.agent(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-release:
		}
	})
	c := h.container("c1")
	for address, why := range map[string]string{refused: "its policies are not known", slow: "i/o timeout", "127.0.0.1:1": "connection refused"} {
		begun := time.Now()
		a := h.run("ADD", h.config("policy", "required", "policy_agent_force_poll_address", address, "policy_timeout_seconds", 1), c.env())
		if a.code != 0 || !strings.Contains(a.stderr, "the container is closed until") || !strings.Contains(a.stderr, why) {
			t.Errorf("agent at %s: %+v, want success and that %q", address, a, why)
		}
		if took := time.Since(begun); took > 4*time.Second {
			t.Errorf("agent at %s: took %v, want about a second at most", address, took)
		}
		h.del(c)
	}
}

// TestAddFailsOnAnAddressWithAnothersRules: while the agent is away nobody takes back what a container that went was allowed.
func TestAddFailsOnAnAddressWithAnothersRules(t *testing.T) {
	h := newHost(t)
	address := h.agent(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) })
	dir, err := endpoint.Open(filepath.Join(h.dir, "endpoints"))
	if err != nil {
		t.Fatal(err)
	}
	required := []any{"policy", "required", "policy_agent_force_poll_address", address}
	c := h.container("c1")
	id, err := c.ns.ID()
	if err != nil {
		t.Fatal(err)
	}
	first := netip.MustParseAddr("10.255.30.2")
	for _, other := range []endpoint.Identity{{Address: first, Namespace: kernel.NSID{Dev: 1, Ino: 2}, Group: "silk"}, {Address: first, Namespace: id, Group: "another"},
		{Address: first, Namespace: id, Group: "silk", Says: endpoint.Says([]byte(`{"space_id":"s1"}`), nil)}} {
		if err := dir.SetIdentities([]endpoint.Identity{other}); err != nil {
			t.Fatal(err)
		}
		code, text := h.run("ADD", h.config(required...), c.env("CNI_ARGS", "IP=10.255.30.2")).failure(t)
		if code != 11 || !strings.Contains(text, fmt.Sprintf("known as one of group %q", other.Group)) {
			t.Errorf("%+v: code %d %q, want it refused", other, code, text)
		}
		if records, bad, err := dir.List(); err != nil || len(records)+len(bad) > 0 {
			t.Errorf("%+v: left behind %v %v %v", other, records, bad, err)
		}
	}
	own := endpoint.Identity{Address: first, Namespace: id, Group: "silk"} // as an earlier version lists it
	if err := dir.SetIdentities([]endpoint.Identity{own}); err != nil {
		t.Fatal(err)
	}
	if a := h.run("ADD", h.config(required...), c.env("CNI_ARGS", "IP=10.255.30.2")); a.code != 0 {
		t.Errorf("its own rules: %+v, want success", a)
	}
	records, _, err := dir.List()
	if err != nil || len(records) != 1 {
		t.Fatal(records, err)
	}
	own.Says = endpoint.Says(records[0].Metadata, records[0].NetOut) // as the agent lists it
	if err := dir.SetIdentities([]endpoint.Identity{own}); err != nil {
		t.Fatal(err)
	}
	if a := h.run("ADD", h.config(required...), c.env("CNI_ARGS", "IP=10.255.30.2")); a.code != 0 {
		t.Errorf("its own rules, once more: %+v, want success", a)
	}
}
