package tlsproxy

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/kernel/tcp"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// patience is how long a behaviour may take to show on a machine that has other things to do.
const patience = 10 * time.Second

// world is a host with a directory of endpoints and one of certificates.
type world struct {
	t      *testing.T
	ns     *kernel.NS
	dir    *endpoint.Dir
	certs  string
	ca     *issuer
	number int
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, ns: netns.New(t), certs: t.TempDir(), ca: newIssuer(t)}
	netns.Shell(t, w.ns, "ip link set lo up && sysctl -qw net.ipv4.ip_forward=1")
	var err error
	if w.dir, err = endpoint.Open(filepath.Join(t.TempDir(), "endpoints")); err != nil {
		t.Fatal(err)
	}
	return w
}

func tryInNS(ns *kernel.NS, command string) (string, error) {
	var out []byte
	err := ns.Do(func() (err error) {
		out, err = exec.Command("sh", "-c", command).CombinedOutput()
		return err
	})
	return string(out), err
}

// logged is what a program logs.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// running is the program in its life.
type running struct {
	*proxy
	t    *testing.T
	log  *logged
	stop func() // and wait
}

func (w *world) config() Config {
	c := DefaultConfig()
	c.EndpointDir, c.Certificates, c.CertificateDirectory, c.PolicyAgent = w.dir.Path(), FromDirectory, w.certs+"/{container}", ""
	c.ClientCAFile = w.ca.file
	return c
}

// start runs the program until stop or the end of the test. Its debug listener is in the test's own namespace, on a port that is free.
func (w *world) start(change ...func(*Config)) *running {
	w.t.Helper()
	c := w.config()
	for _, f := range change {
		f(&c)
	}
	log := &logged{}
	p, err := open(w.t.Context(), c, w.ns, slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		w.t.Fatal(err)
	}
	p.cfg.DebugPort = freePort(w.t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.run(ctx, new(slog.LevelVar)) }()
	r := &running{proxy: p, t: w.t, log: log, stop: sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})}
	w.t.Cleanup(r.stop)
	testkit.Until(w.t, patience, "the debug listener answers", func() bool {
		c, err := net.Dial("tcp4", p.cfg.debugAddress())
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return r
}

func freePort(t testing.TB) int {
	t.Helper()
	n, err := testkit.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// get asks the debug listener.
func (r *running) get(path string) (int, string) {
	r.t.Helper()
	resp, err := http.Get("http://" + r.cfg.debugAddress() + path)
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

// stands returns how the ports of a container stand.
func (r *running) stands(m *member) EndpointStatus {
	r.t.Helper()
	_, text := r.get("/status")
	var list []EndpointStatus
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		r.t.Fatalf("%v: %s", err, text)
	}
	for _, e := range list {
		if e.Key == m.key {
			return e
		}
	}
	return EndpointStatus{}
}

// listens waits until all ports of a container listen.
func (r *running) listens(m *member) {
	r.t.Helper()
	testkit.Within(r.t, patience, func() string {
		e := r.stands(m)
		for _, p := range e.Ports {
			if p.State != stateListening {
				return p.Error
			}
		}
		if len(e.Ports) == 0 {
			return "no ports: " + e.Error
		}
		return ""
	})
}

// refusals returns how often a container's first port refused for a reason.
func (r *running) refusals(m *member, why reason) uint64 {
	r.t.Helper()
	if e := r.stands(m); len(e.Ports) > 0 {
		return e.Ports[0].Refused[why.String()]
	}
	return 0
}

// member is a container: a namespace attached to the host.
type member struct {
	w       *world
	ns      *kernel.NS
	path    string
	key     endpoint.Key
	address netip.Addr
}

var standard = standardPort

// attach makes a container with ports at which TLS ends and, if there are any, with a certificate for it.
func (w *world) attach(ports ...endpoint.TLSListener) *member {
	w.t.Helper()
	m := w.attachAs("web", ports...)
	if len(ports) > 0 {
		m.install(w.ca.issue(w.t, m.address, m.key.Container+".apps.internal"))
	}
	return m
}

func (w *world) attachAs(group string, ports ...endpoint.TLSListener) *member {
	w.t.Helper()
	w.number++
	m := &member{w: w, ns: netns.New(w.t), key: endpoint.Key{Network: "silk", Container: fmt.Sprintf("c%d", w.number), Interface: "eth0"}}
	m.path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), m.ns.FD())
	netns.Shell(w.t, m.ns, "ip link set lo up")
	err := w.ns.Do(func() error {
		r, err := w.dir.Attach(context.Background(), endpoint.Spec{
			Key: m.key, Path: m.path, Namespace: m.ns, Subnet: netip.MustParsePrefix("10.255.30.0/24"), MTU: 1450, Group: group, TLS: ports,
		}, nil)
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

// listen lets serve have connections to a tcp port until the test ends.
func (m *member) listen(port uint16, serve func(*net.TCPConn)) {
	m.w.t.Helper()
	l, err := tcp.Listen(m.ns, netip.AddrPortFrom(netip.IPv4Unspecified(), port), 1024)
	if err != nil {
		m.w.t.Fatal(err)
	}
	var tasks sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	tasks.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, c)
			mu.Unlock()
			tasks.Go(func() { serve(c.(*net.TCPConn)) })
		}
	})
	m.w.t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close() // a container that was taken away does not hear that its connections end
		}
		mu.Unlock()
		tasks.Wait()
	})
}

// echo sends back what comes until no more comes.
func echo(c *net.TCPConn) {
	defer c.Close()
	io.Copy(c, c)
}

// dial connects to a port of another container.
func (m *member) dial(to *member, port uint16) *net.TCPConn {
	m.w.t.Helper()
	c, err := m.reach(to, port)
	if err != nil {
		m.w.t.Fatal(err)
	}
	return c
}

// reach is dial that may come to nothing.
func (m *member) reach(to *member, port uint16) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(m.w.t.Context(), patience)
	defer cancel()
	c, err := tcp.Dial(ctx, m.ns, netip.AddrPortFrom(to.address, port))
	if err != nil {
		return nil, err
	}
	m.w.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(3 * patience))
	return c.(*net.TCPConn), nil
}

// secure connects over TLS, and returns the connection below as well.
func (m *member) secure(to *member, change ...func(*tls.Config)) (*tls.Conn, *net.TCPConn, error) {
	m.w.t.Helper()
	raw, err := m.reach(to, 61443)
	if err != nil {
		return nil, nil, err
	}
	tc := &tls.Config{RootCAs: m.w.ca.pool, ServerName: to.address.String()}
	for _, f := range change {
		f(tc)
	}
	c := tls.Client(raw, tc)
	return c, raw, c.Handshake()
}

// mustSecure is secure that succeeds.
func (m *member) mustSecure(to *member, change ...func(*tls.Config)) (*tls.Conn, *net.TCPConn) {
	m.w.t.Helper()
	c, raw, err := m.secure(to, change...)
	if err != nil {
		m.w.t.Fatal(err)
	}
	return c, raw
}

// said sends a text and reports whether it comes back.
func said(c net.Conn, text string) error {
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != text {
		return fmt.Errorf("%q came back as %q", text, b)
	}
	return nil
}

// issuer is an authority of the platform.
type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
	file string
}

func newIssuer(t testing.TB) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	x := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "platform"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, x, x, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{key: key, pool: x509.NewCertPool(), file: filepath.Join(t.TempDir(), "ca.crt")}
	if i.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	i.pool.AddCert(i.cert)
	if err := os.WriteFile(i.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return i
}

// issued is a certificate and its key in PEM form.
type issued struct{ cert, key []byte }

func (p issued) tls(t testing.TB) tls.Certificate {
	t.Helper()
	c, err := tls.X509KeyPair(p.cert, p.key)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// issue makes a certificate as Diego does: for an address and names, with the application in an organizational unit.
func (i *issuer) issue(t testing.TB, a netip.Addr, name string, change ...func(*x509.Certificate)) issued {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	x := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name, OrganizationalUnit: []string{"app:web"}}, DNSNames: []string{name},
		IPAddresses: []net.IP{a.AsSlice()}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, f := range change {
		f(x)
	}
	der, err := x509.CreateCertificate(rand.Reader, x, i.cert, &key.PublicKey, i.key)
	if err != nil {
		t.Fatal(err)
	}
	kb, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return issued{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kb})}
}

// install puts a certificate where the platform has it.
func (m *member) install(p issued) {
	m.w.t.Helper()
	m.put("instance.crt", p.cert)
	m.put("instance.key", p.key)
}

func (m *member) put(name string, content []byte) {
	m.w.t.Helper()
	dir := filepath.Join(m.w.certs, m.key.Container)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		m.w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".new"), content, 0o600); err != nil {
		m.w.t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, name+".new"), filepath.Join(dir, name)); err != nil {
		m.w.t.Fatal(err)
	}
}

func hasText(all, some string) bool { return strings.Contains(all, some) }

// addressPort is where TLS ends in a container.
func addressPort(m *member) netip.AddrPort { return netip.AddrPortFrom(m.address, 61443) }
