package tlsproxy

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// serialOf connects and returns the serial number of the certificate that is shown.
func (m *member) serialOf(to *member, change ...func(*tls.Config)) (*big.Int, error) {
	c, _, err := m.secure(to, change...)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0].SerialNumber, said(c, "hello")
}

// TestTheNextHandshakeShowsANewCertificate, under load, without a connection that fails or ends.
func TestTheNextHandshakeShowsANewCertificate(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	old, _ := web.mustSecure(api)
	stop := make(chan struct{})
	var load sync.WaitGroup
	var handshakes atomic.Int64
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := web.serialOf(api); err != nil {
					t.Errorf("a handshake during a change: %v", err)
					return
				}
				handshakes.Add(1)
			}
		})
	}
	cache := tls.NewLRUClientSessionCache(10)
	resume := func(tc *tls.Config) { tc.ClientSessionCache = cache }
	for range 20 {
		next := w.ca.issue(t, api.address, "next")
		want := next.tls(t).Leaf.SerialNumber
		api.install(next)
		for _, with := range [][]func(*tls.Config){nil, {resume}} { // a ticket of the certificate before does not bring it back
			if got, err := web.serialOf(api, with...); err != nil || got.Cmp(want) != 0 {
				t.Errorf("shown: %v, want %v: %v", got, want, err)
			}
		}
	}
	close(stop)
	load.Wait()
	if err := said(old, "hello"); err != nil {
		t.Errorf("a connection from before: %v", err)
	}
	if handshakes.Load() == 0 {
		t.Error("there was no load")
	}
}

// TestHalfAPairKeepsTheLastGoodOne, as does whatever else cannot be used.
func TestHalfAPairKeepsTheLastGoodOne(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	was, err := web.serialOf(api)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(w.certs, api.key.Container)
	next := w.ca.issue(t, api.address, "next")
	for what, do := range map[string]func(){
		"a new certificate, the old key": func() { api.put("instance.crt", next.cert) },
		"an empty file":                  func() { api.put("instance.crt", nil) },
		"half a file":                    func() { api.put("instance.crt", next.cert[:len(next.cert)/2]) },
		"no certificate":                 func() { os.Remove(filepath.Join(dir, "instance.crt")) },
		"no directory":                   func() { os.RemoveAll(dir) },
		"a pipe": func() {
			os.MkdirAll(dir, 0o700)
			os.Remove(filepath.Join(dir, "instance.key"))
			if err := syscall.Mkfifo(filepath.Join(dir, "instance.key"), 0o600); err != nil {
				t.Error(err)
			}
		},
		"a link that leads out": func() {
			os.MkdirAll(dir, 0o700)
			os.Remove(filepath.Join(dir, "instance.key"))
			if err := os.Symlink("/etc/passwd", filepath.Join(dir, "instance.key")); err != nil {
				t.Error(err)
			}
		},
	} {
		do()
		if got, err := web.serialOf(api); err != nil || got.Cmp(was) != 0 {
			t.Errorf("%s: shown is %v, want %v: %v", what, got, was, err)
		}
		if e := r.stands(api); e.Certificate.Error == "" || e.Certificate.Serial != was.Text(16) {
			t.Errorf("%s: status says %+v", what, e.Certificate)
		}
	}
	os.RemoveAll(dir)
	api.install(next)
	if got, err := web.serialOf(api); err != nil || got.Cmp(next.tls(t).Leaf.SerialNumber) != 0 {
		t.Errorf("the whole pair: shown is %v: %v", got, err)
	}
	if _, text := r.get("/metrics"); !hasText(text, "silk_tls_certificates_missing 0") || !hasText(text, "silk_tls_certificate_soonest_expiry_timestamp_seconds") {
		t.Error("metrics do not say so")
	}
}

// TestChangesWithinOneTickOfTheClockAreSeen: a file's time and size may be what they were.
func TestChangesWithinOneTickOfTheClockAreSeen(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	dir := filepath.Join(w.certs, api.key.Container)
	for range 30 {
		next := w.ca.issue(t, api.address, "next")
		for name, b := range map[string][]byte{"instance.crt": next.cert, "instance.key": next.key} { // in place
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := web.serialOf(api); err != nil || got.Cmp(next.tls(t).Leaf.SerialNumber) != 0 {
			t.Fatalf("shown is %v: %v", got, err)
		}
	}
}

// TestACertificateOutOfItsTimeIsToldOf: it is shown, since there is no other, and no client takes it.
func TestACertificateOutOfItsTimeIsToldOf(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api := w.attach(standard)
	api.listen(8080, echo)
	r.listens(api)
	for want, at := range map[string][2]time.Duration{"it has expired": {-2 * time.Hour, -time.Hour}, "it begins at": {time.Hour, 2 * time.Hour}, "": {-time.Hour, time.Hour}} {
		api.install(w.ca.issue(t, api.address, "api", func(x *x509.Certificate) {
			x.NotBefore, x.NotAfter = time.Now().Add(at[0]), time.Now().Add(at[1])
		}))
		if got := r.stands(api).Certificate.Error; !hasText(got, want) || want == "" && got != "" {
			t.Errorf("status says %q, want %q", got, want)
		}
		if _, text := r.get("/health"); hasText(text, "degraded") != (want != "") {
			t.Errorf("%s: health says %s", want, text)
		}
	}
}

func TestWithoutACertificateHandshakesAreRefused(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attachAs("web", standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	_, _, err := web.secure(api)
	if err == nil || !hasText(err.Error(), "internal error") {
		t.Errorf("a client hears %v, want an alert", err)
	}
	testkit.Until(t, patience, "it is counted", func() bool { return r.refusals(api, noCertificate) == 1 })
	if !hasText(r.log.String(), "certificate cannot be used") || !hasText(r.log.String(), api.key.Container+"/instance.crt") {
		t.Errorf("the log does not say which file is missing")
	}
	if e := r.stands(api); e.Certificate == nil || !hasText(e.Certificate.Error, api.key.Container+"/instance.crt") {
		t.Errorf("status does not say why: %+v", e.Certificate)
	}
	if _, text := r.get("/metrics"); !hasText(text, "silk_tls_certificates_missing 1") {
		t.Error("metrics do not say so")
	}
	api.install(w.ca.issue(t, api.address, "late"))
	if err := web.tries(api); err != nil {
		t.Error(err)
	}
}

// TestGroupsThatAreNoNamesOfDirectories lead nowhere.
func TestGroupsThatAreNoNamesOfDirectories(t *testing.T) {
	w := newWorld(t)
	r := w.start(func(c *Config) { c.CertificateDirectory = w.certs + "/{group}" })
	web := w.attach()
	if err := os.MkdirAll(filepath.Join(w.certs, "ok"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, group := range []string{"..", ".", "../" + filepath.Base(w.certs), "a/b", "/etc", ""} {
		api := w.attachAs(group, standard)
		for _, dir := range []string{w.certs, filepath.Dir(w.certs), filepath.Join(w.certs, "a/b")} { // where such a name would lead
			p := w.ca.issue(t, api.address, "x")
			os.MkdirAll(dir, 0o700)
			os.WriteFile(filepath.Join(dir, "instance.crt"), p.cert, 0o600)
			os.WriteFile(filepath.Join(dir, "instance.key"), p.key, 0o600)
		}
		r.listens(api)
		if err := web.tries(api); err == nil {
			t.Errorf("group %q has a certificate", group)
		}
		if e := r.stands(api); !hasText(e.Certificate.Error, "cannot be the name of a directory") {
			t.Errorf("group %q: %+v", group, e.Certificate)
		}
		api.detach()
	}
	good := w.attachAs("ok", standard)
	good.listen(8080, echo)
	p := w.ca.issue(t, good.address, "x")
	os.WriteFile(filepath.Join(w.certs, "ok/instance.crt"), p.cert, 0o600)
	os.WriteFile(filepath.Join(w.certs, "ok/instance.key"), p.key, 0o600)
	r.listens(good)
	if err := web.tries(good); err != nil {
		t.Error(err)
	}
}

func TestTemplates(t *testing.T) {
	for template, want := range map[string][2]string{
		"/a/b/{container}":     {"/a/b", "{container}"},
		"/a/b-{group}/x":       {"/a", "b-{group}/x"},
		"/a/b":                 {"/a/b", "."},
		"/{container}/{group}": {"/", "{container}/{group}"},
		"/a//b/../{group}/":    {"/a", "{group}"},
		"a/{container}":        {},
		"/a/{other}":           {},
		"/a/{container":        {},
		"/a/container}":        {"/a/container}", "."},
		"":                     {},
	} {
		base, below, err := splitTemplate(template)
		if got := [2]string{base, below}; err == nil && got != want || (err != nil) != (want == [2]string{}) {
			t.Errorf("%q: %q, %v", template, fmt.Sprint(got), err)
		}
	}
}
