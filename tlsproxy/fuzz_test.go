package tlsproxy

import (
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/config"
)

// FuzzCertificatesOnDisk: whatever is in the files, a certificate that is shown fits its key, and what was good before stays until then.
func FuzzCertificatesOnDisk(f *testing.F) {
	ca := newIssuer(f)
	good, other := ca.issue(f, netip.MustParseAddr("10.255.30.2"), "good"), ca.issue(f, netip.MustParseAddr("10.255.30.3"), "other")
	f.Add(good.cert, good.key)
	f.Add(good.cert, other.key)
	f.Add(append(good.cert[:len(good.cert):len(good.cert)], other.cert...), good.key)
	f.Add(good.cert[:len(good.cert)/2], good.key)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), []byte("-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n"))
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, cert, key []byte) {
		base := t.TempDir()
		cfg := DefaultConfig()
		cfg.CertificateDirectory = base + "/{container}"
		d, err := newDirectory(&cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		r := endpoint.Record{Key: endpoint.Key{Container: "c"}}
		put := func(p issued) {
			if err := os.MkdirAll(filepath.Join(base, "c"), 0o700); err != nil {
				t.Fatal(err)
			}
			for name, b := range map[string][]byte{"instance.crt": p.cert, "instance.key": p.key} {
				if err := os.WriteFile(filepath.Join(base, "c", name), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		put(issued{cert, key})
		first, err := d.show(r)
		if (first == nil) == (err == nil) {
			t.Fatalf("%v, %v", first, err)
		}
		if first != nil {
			if _, err := tls.X509KeyPair(cert, key); err != nil || first.pair.Leaf == nil || !first.expires.Equal(first.pair.Leaf.NotAfter) {
				t.Fatalf("it is shown: %v", err)
			}
		}
		put(good)
		was, err := d.show(r)
		if err != nil {
			t.Fatal(err)
		}
		put(issued{cert, key})
		if now, err := d.show(r); err != nil || first == nil && now != was {
			t.Fatalf("a good one is not kept: %v", err)
		}
	})
}

// FuzzAuthoritiesOfClients: a file is a list of authorities or nothing.
func FuzzAuthoritiesOfClients(f *testing.F) {
	ca := newIssuer(f)
	good, err := os.ReadFile(ca.file)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(ca.issue(f, netip.MustParseAddr("10.255.30.2"), "leaf").cert)
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "ca.crt")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		x := trusted{path: path, log: slog.New(slog.DiscardHandler)}
		b, err := x.bundle()
		if b.IsZero() == (err == nil) || err == nil && b.Pool() == nil {
			t.Fatalf("%v, %v", b, err)
		}
	})
}

// FuzzConfig: what is taken can be worked with.
func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"certificates":"directory","certificate_directory":"/var/vcap/data/instance_identity/{container}"}`))
	f.Add([]byte(`{"certificates":"authority","connectivity_server_url":"https://c:4103","ca_cert_file":"a","client_cert_file":"b","client_key_file":"c","underlay_ip":"10.0.0.1"}`))
	f.Add([]byte(`{"certificates":"directory","certificate_directory":"/{group}/{container}","trust_domain":"silk.internal","max_connections":4,"policy_agent":""}`))
	f.Add([]byte(`{"certificate_directory":"{"}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		c := DefaultConfig()
		if _, err := config.Parse(text, &c); err != nil {
			return
		}
		if c.connectTimeout() <= 0 || c.handshakeTimeout() <= 0 || c.Handshakes < 1 || c.Connections < 1 {
			t.Fatalf("%+v", c)
		}
		if c.Certificates == FromDirectory {
			d, err := newDirectory(&c, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			below, err := d.place(endpoint.Record{Key: endpoint.Key{Container: "c1"}, Group: "../../etc"})
			if err == nil && !filepath.IsLocal(below) {
				t.Fatalf("%q leads out of %q", below, d.base)
			}
		}
	})
}

// FuzzHello: what a client sends first, whole or in pieces, ends its own connection at most.
func FuzzHello(f *testing.F) {
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), 3)
	f.Add([]byte("\x16\x03\x01\x00\x04\x01\x00\x00\x00"), 1)
	f.Add([]byte("\x16\x03\x01\xff\xff"), 5)
	f.Add(hello(f), 1)
	f.Add(hello(f), 100)
	ca := newIssuer(f)
	pair := ca.issue(f, netip.MustParseAddr("127.0.0.1"), "x").tls(f)
	cfg := DefaultConfig()
	p := &proxy{cfg: cfg, log: slog.New(slog.DiscardHandler), files: 1 << 20, certificates: fixed{&credential{pair: pair}}}
	s := &site{proxy: p, turns: make(chan struct{}, 1), conns: map[*conn]bool{}, peers: map[netip.Addr]held{}, closed: false}
	q := &port{site: s, spec: standardPort}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	f.Fuzz(func(t *testing.T, text []byte, piece int) {
		client, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		from, err := newSource(server.(*net.TCPConn))
		if err != nil {
			t.Fatal(err)
		}
		c := &conn{port: q, peer: addressOf(server.RemoteAddr()), local: addressOf(server.LocalAddr()), wire: &wire{TCPConn: server.(*net.TCPConn), in: from, turns: s.turns}}
		done := make(chan error, 1)
		go func() { done <- c.handshake(t.Context()) }()
		piece = min(max(piece, 1), 1<<16)
		for b := text; len(b) > 0; b = b[min(piece, len(b)):] {
			if _, err := client.Write(b[:min(piece, len(b))]); err != nil {
				break
			}
		}
		client.(*net.TCPConn).CloseWrite()
		go io.Copy(io.Discard, client)
		select {
		case err := <-done:
			if err == nil {
				t.Fatal("a handshake succeeded without a client")
			}
		case <-time.After(cfg.handshakeTimeout() + patience):
			t.Fatal("a handshake does not end")
		}
		c.wire.in.drop()
		c.abort()
		if len(s.turns) != 0 {
			t.Fatal("a turn is not given back")
		}
	})
}

// fixed always shows one certificate.
type fixed struct{ *credential }

func (f fixed) show(endpoint.Record) (*credential, error)    { return f.credential, nil }
func (f fixed) inspect(endpoint.Record) (*credential, error) { return f.credential, nil }
func (f fixed) trust() (trust, error)                        { return trust{}, nil }
func (f fixed) keep([]endpoint.Record)                       {}

var standardPort = endpoint.TLSListener{Listen: 61443, Forward: 8080}

// hello returns what a client of crypto/tls sends first.
func hello(f *testing.F) []byte {
	a, b := net.Pipe()
	defer b.Close()
	go func() {
		tls.Client(a, &tls.Config{ServerName: "x"}).Handshake()
		a.Close()
	}()
	buf := make([]byte, 4096)
	n, err := b.Read(buf)
	if err != nil {
		f.Fatal(err)
	}
	return buf[:n]
}
