package policyagent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/secgroup"
)

// world is a host with a directory of endpoints and an agent on it, and a database of policies.
type world struct {
	t      *testing.T
	ns     *kernel.NS
	dir    *endpoint.Dir
	state  string
	store  *policysql.Store
	groups secgroup.Feed // of security groups; nil: there are none
	number int           // of containers so far
	keys   []endpoint.Key
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, ns: netns.New(t), state: filepath.Join(t.TempDir(), "state")}
	w.onHost("ip link set lo up && sysctl -qw net.ipv4.ip_forward=1")
	var err error
	if w.dir, err = endpoint.Open(filepath.Join(t.TempDir(), "endpoints")); err != nil {
		t.Fatal(err)
	}
	return w
}

// onHost runs a command in the host's namespace.
func (w *world) onHost(command string) string {
	w.t.Helper()
	return netns.Shell(w.t, w.ns, command)
}

// policies opens the database and serves it until the test ends.
func (w *world) policies() *policysql.Store {
	w.t.Helper()
	s, err := policysql.Open(w.t.Context(), policysql.Config{DB: sqldb.Config{Type: sqldb.SQLite, Path: filepath.Join(w.t.TempDir(), "policy.db")}}, quiet)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
		s.Close()
	})
	w.store = s
	return s
}

// quiet is a log that nobody reads.
var quiet = slog.New(slog.DiscardHandler)

// running is an agent in its life.
type running struct {
	*agent
	t    *testing.T
	stop func() // and wait
}

func (w *world) config() Config {
	c := DefaultConfig()
	c.Host, c.StateDir, c.EndpointDir = "10.0.0.1", w.state, w.dir.Path()
	return c
}

// start runs an agent until stop or the end of the test. Its listeners are in the test's own namespace, on ports that are free.
func (w *world) start(feed policy.Feed, change ...func(*Config)) *running {
	w.t.Helper()
	return w.startAt(freePort(w.t), feed, change...)
}

// startAt is start with a debug server at a port.
func (w *world) startAt(port int, feed policy.Feed, change ...func(*Config)) *running {
	w.t.Helper()
	c := w.config()
	for _, f := range change {
		f(&c)
	}
	a, err := open(w.t.Context(), c, w.ns, quiet)
	if err != nil {
		w.t.Fatal(err)
	}
	a.cfg.ForcePort, a.cfg.DebugPort = freePort(w.t), port
	a.groupFeed = w.groups
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.run(ctx, feed, new(slog.LevelVar)) }()
	stopped := false
	r := &running{agent: a, t: w.t, stop: func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
		a.close()
	}}
	w.t.Cleanup(r.stop)
	eventually(w.t, "the agent listens", 30*time.Second, func() bool {
		c, err := net.Dial("tcp4", a.cfg.debugAddress())
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return r
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// get asks the force or debug listener.
func (r *running) get(address, path string) (int, string) {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func (r *running) force(path string) (int, string) {
	r.t.Helper()
	return r.get(r.cfg.forceAddress(), path)
}

// member is a container: a namespace attached to the host.
type member struct {
	w       *world
	ns      *kernel.NS
	key     endpoint.Key
	address netip.Addr
}

// attach makes a container of a group.
func (w *world) attach(group string) *member {
	w.t.Helper()
	w.number++
	return w.attachAs(fmt.Sprintf("c%d", w.number), group, netip.Addr{})
}

func (w *world) attachAs(id, group string, address netip.Addr, more ...func(*endpoint.Spec)) *member {
	w.t.Helper()
	m := &member{w: w, ns: netns.New(w.t), key: endpoint.Key{Network: "silk", Container: id, Interface: "eth0"}}
	w.keys = append(w.keys, m.key)
	err := w.ns.Do(func() error {
		s := endpoint.Spec{
			Key: m.key, Path: "/nowhere", Namespace: m.ns, Subnet: netip.MustParsePrefix("10.255.30.0/24"), MTU: 1450, Group: group, Requested: address,
		}
		for _, change := range more {
			change(&s)
		}
		r, err := w.dir.Attach(context.Background(), s, nil)
		m.address = r.Address()
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return m
}

// detach takes the container away.
func (m *member) detach() {
	m.w.t.Helper()
	if err := m.w.ns.Do(func() error { return m.w.dir.Detach(context.Background(), m.key, m.ns, nil) }); err != nil {
		m.w.t.Fatal(err)
	}
}

// listen accepts connections on a tcp port until the test ends and echoes what comes.
func (m *member) listen(port int) {
	m.w.t.Helper()
	var l net.Listener
	if err := m.ns.Do(func() (err error) { l, err = net.Listen("tcp4", fmt.Sprintf(":%d", port)); return err }); err != nil {
		m.w.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	m.w.t.Cleanup(func() { l.Close(); <-done })
}

// dial connects to a port of another container.
func (m *member) dial(to *member, port int) (net.Conn, error) {
	var c net.Conn
	err := m.ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp4", netip.AddrPortFrom(to.address, uint16(port)).String(), 3*time.Second)
		return err
	})
	return c, err
}

// reaches reports whether a connection can be made, and echoes.
func (m *member) reaches(to *member, port int) bool {
	c, err := m.dial(to, port)
	if err != nil {
		return false
	}
	defer c.Close()
	return echoes(c)
}

func echoes(c net.Conn) bool {
	c.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		return false
	}
	var b [1]byte
	_, err := io.ReadFull(c, b[:])
	return err == nil
}

// eventually waits until a behaviour shows.
func eventually(t *testing.T, what string, within time.Duration, ok func() bool) {
	t.Helper()
	testkit.Until(t, within, what, ok)
}

func tcpPolicy(from, to string, port uint16) policy.Policy {
	return policy.Policy{Source: identity.Group(from), Destination: identity.Group(to), Protocol: policy.TCP, Ports: policy.Ports{First: port, Last: port}}
}

// allow creates a policy and waits until the agent has it in the kernel.
// allow returns when policies are in force, and the containers have their rules that can have any: the agent may have heard of policies first.
func (w *world) allow(r *running, ps ...policy.Policy) {
	w.t.Helper()
	rev, err := w.store.CreateWithin(w.t.Context(), ps, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	r.inForceAt(rev.Counter)
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	for _, k := range w.keys {
		r.awaitContainer(ctx, k)
	}
}

func (w *world) forbid(r *running, ps ...policy.Policy) {
	w.t.Helper()
	rev, err := w.store.Remove(w.t.Context(), ps)
	if err != nil {
		w.t.Fatal(err)
	}
	r.inForceAt(rev.Counter)
}

func (r *running) inForceAt(counter uint64) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	if !r.await(ctx, func() bool { return r.now.inForce.Counter >= counter }) {
		r.t.Fatalf("revision %d is not in force", counter)
	}
}

// table returns the policy table as text.
func (w *world) table() string {
	w.t.Helper()
	return w.onHost("nft list table inet " + nft.Name)
}

func hasText(all, some string) bool { return strings.Contains(all, some) }
