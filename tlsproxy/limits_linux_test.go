package tlsproxy

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
)

func TestShares(t *testing.T) {
	for _, x := range []struct {
		limit, used, mine, sharers int
		want                       bool
	}{
		{100, 0, 0, 1, true}, {100, 99, 99, 1, true}, {100, 100, 100, 1, false}, {100, 59, 59, 5, true}, {100, 60, 60, 5, false}, {100, 60, 9, 5, true},
		{100, 60, 10, 5, false}, {100, 99, 0, 5, true}, {100, 100, 0, 5, false}, {4, 2, 0, 2, true}, {4, 3, 3, 2, false}, {100, 60, 0, 0, true},
	} {
		if got := may(x.limit, x.used, x.mine, x.sharers); got != x.want {
			t.Errorf("may(%d, %d, %d, %d) = %t", x.limit, x.used, x.mine, x.sharers, got)
		}
	}
}

// TestSlowClientsEnd: who does not go on with its handshake is let go, whatever it sent before.
func TestSlowClientsEnd(t *testing.T) {
	w := newWorld(t)
	r := w.start(func(c *Config) { c.HandshakeTimeout = 1 })
	api, web := w.attach(standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	silent := web.dial(api, 61443)
	begun := web.dial(api, 61443)
	begun.Write([]byte{22, 3, 1, 2, 0, 1})
	dripping := web.dial(api, 61443)
	var drip sync.WaitGroup
	drip.Go(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		hello := append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 0xfc}, make([]byte, 500)...)
		for _, b := range hello {
			if _, err := dripping.Write([]byte{b}); err != nil {
				return
			}
			<-tick.C
		}
	})
	for name, c := range map[string]net.Conn{"silent": silent, "one that has begun": begun, "one that drips": dripping} {
		start := time.Now()
		if _, err := io.ReadAll(c); err == nil && name != "one that drips" {
			t.Logf("%s: ended properly", name)
		}
		if d := time.Since(start); d > patience {
			t.Errorf("%s: ended after %v", name, d)
		}
	}
	drip.Wait()
	testkit.Until(t, patience, "they are forgotten and counted", func() bool { return r.count() == 0 && r.refusals(api, slow) == 3 })
	if err := web.tries(api); err != nil {
		t.Error(err)
	}
	c, _ := web.mustSecure(api) // one that has done its handshake may take its time
	pause := time.NewTimer(1500 * time.Millisecond)
	<-pause.C
	if err := said(c, "hello"); err != nil {
		t.Errorf("after a pause: %v", err)
	}
}

// TestAFloodOfHandshakesHarmsNoOther: neither other clients of the container, nor other containers.
func TestAFloodOfHandshakesHarmsNoOther(t *testing.T) {
	w := newWorld(t)
	r := w.start(func(c *Config) { c.Unfinished, c.Handshakes = 64, 2 })
	api, other, web, flooder := w.attach(standard), w.attach(standard), w.attach(), w.attach()
	api.listen(8080, echo)
	other.listen(8080, echo)
	r.listens(api)
	r.listens(other)
	var silent []net.Conn
	for range 200 {
		if c, err := flooder.reach(api, 61443); err == nil {
			silent = append(silent, c)
		}
	}
	testkit.Until(t, patience, "most are refused", func() bool { return r.refusals(api, hurried) == 200-48 })
	for range 20 {
		if err := web.tries(api); err != nil {
			t.Errorf("another client of the container: %v", err)
		}
		if err := web.tries(other); err != nil {
			t.Errorf("a client of another container: %v", err)
		}
	}
	if err := flooder.tries(api); err == nil {
		t.Error("the flooder itself has no limit")
	}
	for _, c := range silent {
		c.Close()
	}
	testkit.Until(t, patience, "its places are free again", func() bool { return flooder.tries(api) == nil })
}

// TestConnectionsAreBounded for each container and for the host, and nobody can have them all.
func TestConnectionsAreBounded(t *testing.T) {
	w := newWorld(t)
	r := w.start(func(c *Config) { c.ContainerConnections, c.Connections = 20, 30 })
	api, other, web, greedy := w.attach(standard), w.attach(standard), w.attach(), w.attach()
	api.listen(8080, echo)
	other.listen(8080, echo)
	r.listens(api)
	r.listens(other)
	var open []*tls.Conn
	for {
		c, _, err := greedy.secure(api)
		if err != nil {
			break
		}
		if said(c, "hello") != nil {
			break
		}
		open = append(open, c)
	}
	if len(open) != 15 {
		t.Errorf("one client has %d connections of 20, want 15", len(open))
	}
	for n := range 3 { // half of 20, shared with the greedy one and whoever may come
		c, _ := web.mustSecure(api)
		if err := said(c, "hello"); err != nil {
			t.Errorf("connection %d of another client: %v", n, err)
		}
	}
	for n := range 7 { // of the host's 30, half is for whoever comes, and each container has its share of the rest
		c, _ := web.mustSecure(other)
		if err := said(c, "hello"); err != nil {
			t.Errorf("connection %d of another container: %v", n, err)
		}
	}
	if r.refusals(api, crowded) == 0 {
		t.Error("refusals are not counted")
	}
	for _, c := range open {
		if err := said(c, "still here"); err != nil {
			t.Errorf("a connection that was there before: %v", err)
		}
		c.Close()
	}
	testkit.Until(t, patience, "the places are free again", func() bool { return greedy.tries(api) == nil })
}

// TestLongHandshakesAreRefused long before their messages are whole: what a client has sent of one is kept.
func TestLongHandshakesAreRefused(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	c := web.dial(api, 61443)
	record := append([]byte{22, 3, 1, 0x3e, 0x80}, make([]byte, 16_000)...)
	copy(record[5:], []byte{1, 0, 0xff, 0xfb}) // a hello of nearly 64 KiB, of which this is a quarter
	c.Write(record)
	clear(record[5:9])
	c.Write(record)
	c.Write(record)
	io.ReadAll(c)
	testkit.Until(t, patience, "it is refused", func() bool { return r.refusals(api, garbled) == 1 && r.count() == 0 })
	if n := r.refusals(api, slow); n != 0 {
		t.Errorf("%d waited for the rest", n)
	}
	long := w.ca.issue(t, web.address, "long", func(x *x509.Certificate) {
		for n := range 400 {
			x.DNSNames = append(x.DNSNames, fmt.Sprintf("a-name-that-is-not-short-%d.apps.internal", n))
		}
	})
	mutually := w.attach(mutual)
	mutually.listen(8080, echo)
	r.listens(mutually)
	if err := web.tries(mutually, shows(t, long)); err != nil {
		t.Errorf("a client with a certificate of %d bytes: %v", len(long.cert), err)
	}
}

// TestGarbageHarmsNobody: what is no handshake ends there.
func TestGarbageHarmsNobody(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	for _, text := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\x00\x00", "\x80\x2e\x01\x00\x02", "\x16\x03\x01\xff\xff" + string(make([]byte, 70_000)), "\x15\x03\x03\x00\x02\x02\x28", "\x16\x03\x01\x00\x04\x01\x00\x00\x00"} {
		c := web.dial(api, 61443)
		io.WriteString(c, text)
		c.CloseWrite()
		if b, _ := io.ReadAll(c); len(b) > 100 {
			t.Errorf("%.20q was answered by %d bytes", text, len(b))
		}
	}
	testkit.Until(t, patience, "all are counted", func() bool { return r.refusals(api, garbled) == 6 && r.count() == 0 })
	if err := web.tries(api); err != nil {
		t.Error(err)
	}
	if _, text := r.get("/metrics"); !hasText(text, fmt.Sprintf(`silk_tls_connections_refused_total{reason="%s"} 6`, garbled)) {
		t.Error("metrics do not say so")
	}
}
