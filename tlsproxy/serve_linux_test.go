package tlsproxy

import (
	"bytes"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

func TestTLSEndsInTheContainer(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	var from atomic.Value
	api.listen(8080, func(c *net.TCPConn) {
		from.Store(c.RemoteAddr().(*net.TCPAddr).IP.String())
		echo(c)
	})
	r.listens(api)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		c, _ := web.mustSecure(api, func(tc *tls.Config) { tc.MinVersion, tc.MaxVersion = version, version })
		if s := c.ConnectionState(); s.Version != version || s.NegotiatedProtocol != "" {
			t.Errorf("version %x, protocol %q: expected %x and none", s.Version, s.NegotiatedProtocol, version)
		}
		if err := said(c, "hello"); err != nil {
			t.Errorf("version %x: %v", version, err)
		}
	}
	if got := from.Load(); got != api.address.String() {
		t.Errorf("the container sees a connection from %v, want its own address %v", got, api.address)
	}
	if _, _, err := web.secure(api, func(tc *tls.Config) { tc.MinVersion, tc.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }); err == nil {
		t.Error("TLS 1.1 was agreed on")
	}
	for _, s := range tls.CipherSuites() {
		if s.SupportedVersions[0] == tls.VersionTLS13 {
			continue
		}
		_, _, err := web.secure(api, func(tc *tls.Config) { tc.MaxVersion, tc.CipherSuites = tls.VersionTLS12, []uint16{s.ID} })
		if good := strings.HasPrefix(s.Name, "TLS_ECDHE_ECDSA") && !strings.HasSuffix(s.Name, "SHA") && !strings.Contains(s.Name, "CBC"); good != (err == nil) {
			t.Errorf("suite %s: %v", s.Name, err)
		}
	}
}

func TestProtocolsAreNegotiatedOnlyWhenConfigured(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	withALPN := standard
	withALPN.ALPN = []string{"h2", "http/1.1"}
	api, plain, web := w.attach(withALPN), w.attach(standard), w.attach()
	api.listen(8080, echo)
	plain.listen(8080, echo)
	r.listens(api)
	r.listens(plain)
	for _, x := range []struct {
		to   *member
		want string
	}{{api, "h2"}, {plain, ""}} {
		c, _ := web.mustSecure(x.to, func(tc *tls.Config) { tc.NextProtos = []string{"http/1.1", "h2"} })
		if got := c.ConnectionState().NegotiatedProtocol; got != x.want {
			t.Errorf("negotiated %q, want %q", got, x.want)
		}
	}
}

// TestIndependentClients: curl and openssl think the same of the certificate and of the bytes.
func TestIndependentClients(t *testing.T) {
	w := newWorld(t)
	for _, tool := range []string{"curl", "openssl"} {
		_, err := exec.LookPath(tool)
		testkit.Require(t, "tools", err)
	}
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, func(c *net.TCPConn) {
		defer c.Close()
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", n, b[:n])
	})
	r.listens(api)
	name := api.key.Container + ".apps.internal"
	out := netns.Shell(t, web.ns, fmt.Sprintf("curl -sS --max-time 10 --cacert %s --resolve %s:61443:%v https://%s:61443/path", w.ca.file, name, api.address, name))
	if !hasText(out, "GET /path HTTP/1.1") {
		t.Errorf("curl got %q", out)
	}
	if out, err := tryInNS(web.ns, fmt.Sprintf("curl -sS --max-time 10 --cacert %s --resolve x.apps.internal:61443:%v https://x.apps.internal:61443/", w.ca.file, api.address)); err == nil {
		t.Errorf("curl took the certificate for another name: %s", out)
	}
	for _, version := range []string{"-tls1_2", "-tls1_3"} {
		out = netns.Shell(t, web.ns, fmt.Sprintf("printf 'GET /openssl HTTP/1.0\\r\\n\\r\\n' | openssl s_client -ign_eof -quiet -verify_return_error %s -CAfile %s -verify_ip %v -connect %v:61443",
			version, w.ca.file, api.address, api.address))
		if !hasText(out, "GET /openssl HTTP/1.0") {
			t.Errorf("openssl %s got %q", version, out)
		}
	}
	for _, version := range []string{"-tls1_2", "-tls1_3"} { // resumption, and a second look at the same certificate
		session := filepath.Join(t.TempDir(), "session")
		ask := fmt.Sprintf("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | openssl s_client -ign_eof %s -CAfile %s -connect %v:61443", version, w.ca.file, api.address)
		netns.Shell(t, web.ns, ask+" -sess_out "+session)
		if out := netns.Shell(t, web.ns, ask+" -sess_in "+session); !hasText(out, "Reused, ") {
			t.Errorf("%s: the session was not resumed: %s", version, out)
		}
	}
}

// TestBytesPassUntouched in both directions at once, in pieces of all sizes.
func TestBytesPassUntouched(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	sums := make(chan [32]byte, 10)
	const size = 20 << 20
	stream := func(dst io.Writer, seed uint64) [32]byte {
		rng, h := rand.New(rand.NewPCG(seed, 1)), sha256.New()
		b := make([]byte, 200_000)
		for n := 0; n < size; {
			piece := b[:min(1+rng.IntN(len(b)), size-n)]
			if rng.IntN(3) == 0 {
				piece = b[:min(1+rng.IntN(100), size-n)]
			}
			for i := range piece {
				piece[i] = byte(rng.Uint32())
			}
			h.Write(piece)
			if _, err := dst.Write(piece); err != nil {
				t.Error(err)
				break
			}
			n += len(piece)
		}
		return [32]byte(h.Sum(nil))
	}
	read := func(src io.Reader) [32]byte {
		h := sha256.New()
		if n, err := io.Copy(h, src); err != nil || n != size {
			t.Errorf("read %d bytes, want %d: %v", n, size, err)
		}
		return [32]byte(h.Sum(nil))
	}
	api.listen(8080, func(c *net.TCPConn) {
		defer c.Close()
		var both sync.WaitGroup
		both.Go(func() { sums <- stream(c, 1); c.CloseWrite() })
		got := read(c)
		both.Wait()
		sums <- got
	})
	r.listens(api)
	c, _ := web.mustSecure(api)
	var sent [32]byte
	var both sync.WaitGroup
	both.Go(func() {
		sent = stream(c, 2)
		c.CloseWrite()
	})
	got := read(c)
	both.Wait()
	if appSent, appGot := <-sums, <-sums; appSent != got || appGot != sent {
		t.Error("the bytes are not the same at both ends")
	}
	e := r.stands(api)
	if len(e.Ports) == 0 || r.port(api).stats.received.Load() != size || r.port(api).stats.sent.Load() != size {
		t.Errorf("counted other than %d bytes each way: %+v", size, e)
	}
}

// port returns the first port of a container.
func (r *running) port(m *member) *port {
	r.t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sites[m.key] == nil {
		r.t.Fatalf("no ports for %v", m.key)
	}
	return r.sites[m.key].ports[0]
}

// TestHalfClosedConnections: each side can end and still listen.
func TestHalfClosedConnections(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, func(c *net.TCPConn) { // hears everything before it answers
		defer c.Close()
		b, err := io.ReadAll(c)
		if err != nil {
			t.Errorf("read to the end: %v", err)
		}
		c.Write(bytes.ToUpper(b))
	})
	talker := w.attach(standard)
	heard := make(chan string, 10)
	talker.listen(8080, func(c *net.TCPConn) { // ends its side at once, and goes on listening
		defer c.Close()
		io.WriteString(c, "greeting")
		c.CloseWrite()
		b, _ := io.ReadAll(c)
		heard <- string(b)
	})
	r.listens(api)
	r.listens(talker)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		pin := func(tc *tls.Config) { tc.MaxVersion = version }
		c, _ := web.mustSecure(api, pin)
		io.WriteString(c, "question")
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(c); string(b) != "QUESTION" || err != nil {
			t.Errorf("version %x: after the client ended its side: %q, %v", version, b, err)
		}
		c, _ = web.mustSecure(talker, pin)
		if b, err := io.ReadAll(c); string(b) != "greeting" || err != nil {
			t.Errorf("version %x: before the container ended its side: %q, %v", version, b, err)
		}
		if _, err := io.WriteString(c, "answer"); err != nil {
			t.Errorf("version %x: after the container ended its side: %v", version, err)
		}
		c.CloseWrite()
		if got := <-heard; got != "answer" {
			t.Errorf("version %x: the container heard %q", version, got)
		}
	}
	testkit.Until(t, patience, "connections that have ended are forgotten", func() bool { return r.count() == 0 })
}

// TestCutConnectionsAreNoEnds: what one side did not end properly is not passed on as an end.
func TestCutConnectionsAreNoEnds(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	ends := make(chan error, 10)
	api.listen(8080, func(c *net.TCPConn) {
		defer c.Close()
		_, err := io.ReadAll(c)
		ends <- err
	})
	rude := w.attach(standard)
	rude.listen(8080, func(c *net.TCPConn) {
		io.WriteString(c, "half of")
		io.ReadFull(c, make([]byte, 1))
		c.SetLinger(0)
		c.Close()
	})
	r.listens(api)
	r.listens(rude)
	c, raw := web.mustSecure(api)
	io.WriteString(c, "half of")
	raw.CloseWrite() // as somebody on the way could
	if err := <-ends; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection cut by the client ended with %v for the container, want ECONNRESET", err)
	}
	if n := r.port(api).stats.truncated.Load(); n != 1 {
		t.Errorf("counted %d cut connections, want 1", n)
	}
	c, raw = web.mustSecure(api)
	io.WriteString(c, "half of")
	raw.SetLinger(0)
	raw.Close()
	if err := <-ends; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection reset by the client ended with %v for the container, want ECONNRESET", err)
	}
	c, _ = web.mustSecure(rude)
	io.ReadFull(c, make([]byte, 7))
	io.WriteString(c, "x")
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a connection reset by the container ended with %d, %v for the client, want ECONNRESET", n, err)
	}
	testkit.Until(t, patience, "connections that were cut are forgotten", func() bool { return r.count() == 0 })
}

// TestAnswerOfAContainerThatStopsListening: what it said last reaches a client that is still sending.
func TestAnswerOfAContainerThatStopsListening(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1000))
		io.WriteString(c, strings.Repeat("too large ", 10_000))
		c.CloseWrite()
		c.CloseRead()
		c.Close() // with bytes unread: the container's kernel resets
	})
	r.listens(api)
	for range 20 {
		c, _ := web.mustSecure(api)
		var sending sync.WaitGroup
		var refused error
		sending.Go(func() {
			b := make([]byte, 10_000)
			for i := 0; i < 100 && refused == nil; i++ {
				_, refused = c.Write(b)
			}
		})
		// The kernel may itself have thrown away what the container said; what reached the proxy must reach the client.
		n, err := io.Copy(io.Discard, c)
		sent := r.port(api).stats.sent.Load()
		c.Close()
		sending.Wait()
		if err == nil && n != 100_000 && !errors.Is(refused, syscall.ECONNRESET) { // a reset is said once, and crypto/tls takes what follows for an end
			t.Errorf("read %d bytes and then a proper end, of %d", n, sent)
		}
	}
	testkit.Until(t, patience, "all are forgotten", func() bool { return r.count() == 0 })
}

func TestAContainerThatDoesNotListen(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	r.listens(api)
	c, _, err := web.secure(api)
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if err == nil || errors.Is(err, io.EOF) {
		t.Errorf("a connection that reaches nobody ended with %v, want a reset", err)
	}
	testkit.Until(t, patience, "the refusal is counted", func() bool { return r.refusals(api, unreachable) == 1 })
	if e := r.stands(api); !hasText(e.Ports[0].Forwarded, "connection refused") {
		t.Errorf("status does not say why: %+v", e)
	}
	testkit.Until(t, patience, "the log says what to do", func() bool { return hasText(r.log.String(), "see that the application listens on the port") })
}

// TestPressureComesBack: who does not read stops the other end, with bounded memory between.
func TestPressureComesBack(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	wrote := make(chan int64, 1)
	api.listen(8080, func(c *net.TCPConn) {
		defer c.Close()
		c.SetWriteDeadline(time.Now().Add(time.Second))
		n, _ := io.Copy(c, endless{})
		c.SetWriteDeadline(time.Time{})
		wrote <- n
		io.Copy(c, strings.NewReader("end"))
	})
	r.listens(api)
	c, _ := web.mustSecure(api)
	n := <-wrote
	if n > 64<<20 {
		t.Errorf("the container wrote %d bytes that nobody read", n)
	}
	got, err := io.Copy(io.Discard, c)
	if err != nil || got < n || got > n+largeBuffer+3 {
		t.Errorf("read %d bytes of about %d: %v", got, n, err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// TestALateReaderHearsTheEnd: a client that takes a pause of any length gets everything and a proper end.
func TestALateReaderHearsTheEnd(t *testing.T) {
	if testing.Short() {
		t.Skip("it pauses for longer than crypto/tls would wait")
	}
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	const size = 32 << 20 // more than the kernel's buffers on the way
	closed := make(chan struct{}, 1)
	api.listen(8080, func(c *net.TCPConn) {
		io.CopyN(c, endless{}, size)
		c.Close()
		closed <- struct{}{}
	})
	r.listens(api)
	c, _ := web.mustSecure(api)
	var got int64
	pause := time.NewTimer(7 * time.Second)
	defer pause.Stop()
	for done := false; !done; { // enough is read for the container to end, then nothing
		select {
		case <-closed:
			done = true
		default:
			n, err := c.Read(make([]byte, 16<<10))
			if err != nil {
				t.Fatal(err)
			}
			got += int64(n)
		}
	}
	<-pause.C
	n, err := io.Copy(io.Discard, c)
	if got += n; got != size || err != nil {
		t.Errorf("read %d bytes of %d: %v", got, size, err)
	}
}
