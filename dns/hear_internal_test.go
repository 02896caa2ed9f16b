package dns

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/registration"
)

func TestMessagesThatAreLostAreAskedFor(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	cfg := DefaultConfig()
	cfg.NATS.Hosts = []NATSHost{{"127.0.0.1", uint16(n.Port)}}
	e, err := newEar(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	up := make(chan struct{}, 10)
	heard := make(chan int, 1<<20)
	e.hear = func(_ string, b []byte) { <-read; heard <- len(b) }
	e.up, e.down, e.asked, e.pause = func() { up <- struct{}{} }, func() {}, func(time.Duration) {}, 50*time.Millisecond
	var wg sync.WaitGroup
	stop := cancelled(t, &wg, e)
	defer wg.Wait()
	defer stop()
	<-up
	c, err := nats.Connect("nats://" + n.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	starts, err := c.SubscribeSync(registration.SubjectStart)
	if err != nil {
		t.Fatal(err)
	}
	const size, count = 60 << 10, 1600 // 94 MiB
	payload := bytes.Repeat([]byte{' '}, size)
	for range count {
		if err := c.Publish(registration.SubjectRegister, payload); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.FlushTimeout(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	for {
		m, err := starts.NextMsg(20 * time.Second) // the first may be of the connection
		if err != nil {
			t.Fatalf("lost %d: %v", e.dropped.Load(), err)
		}
		if e.dropped.Load() > 0 && bytes.Equal(m.Data, e.start) {
			break
		}
	}
	if got := e.queue.waiting(); got > queueBytes {
		t.Errorf("%d bytes wait, want at most %d", got, queueBytes)
	}
	close(read)
	testkit.Until(t, 20*time.Second, "all that was kept is read, and room is made", func() bool {
		return uint64(len(heard))+e.dropped.Load() == count && e.queue.waiting() == 0
	})
	if len(heard) < queueBytes/(size+messageCost)-1 {
		t.Errorf("%d messages were kept", len(heard))
	}
}

// cancelled runs an ear until what is returned is called.
func cancelled(t *testing.T, wg *sync.WaitGroup, e *ear) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	wg.Go(func() {
		if err := e.run(ctx); err != nil {
			t.Error(err)
		}
	})
	return cancel
}

// TestAnErrorNobodyKnowsIsNoEnd: the client gives up when a server says one, and is begun anew.
func TestAnErrorNobodyKnowsIsNoEnd(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cfg := DefaultConfig()
	cfg.NATS.Hosts = []NATSHost{{"127.0.0.1", uint16(ln.Addr().(*net.TCPAddr).Port)}}
	e, err := newEar(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	states := make(chan string, 10)
	e.hear, e.asked = func(string, []byte) {}, func(time.Duration) {}
	e.up, e.down = func() { states <- "up" }, func() { states <- "down" }
	var wg sync.WaitGroup
	stop := cancelled(t, &wg, e)
	defer wg.Wait()
	defer stop()
	for range 2 {
		upAndDown(t, ln, states)
	}
}

// upAndDown is a server that lets a client connect and then says an error that it does not know.
func upAndDown(t *testing.T, ln net.Listener, states <-chan string) {
	t.Helper()
	c := greetClient(t, ln)
	defer c.Close()
	if s := <-states; s != "up" {
		t.Errorf("%s, want up", s)
	}
	fmt.Fprint(c, "-ERR 'Slow Consumer'\r\n")
	if s := <-states; s != "down" {
		t.Errorf("%s, want down", s)
	}
}

// greetClient is a server that lets a client connect, and is alive until the connection is closed.
func greetClient(t *testing.T, ln net.Listener) net.Conn {
	t.Helper()
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, `INFO {"server_id":"x","version":"2.9.0","proto":1,"max_payload":1048576}`+"\r\n")
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(line, "PING") {
			break
		}
	}
	fmt.Fprint(c, "PONG\r\n")
	go func() { // ends with the connection, which each test closes
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			if strings.HasPrefix(line, "PING") {
				fmt.Fprint(c, "PONG\r\n")
			}
		}
	}()
	return c
}

// TestACertificateThatIsAwayIsNoEnd: who is dropped while the files are being replaced tries again when they are there.
func TestACertificateThatIsAwayIsNoEnd(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cfg := DefaultConfig()
	cfg.NATS.Hosts = []NATSHost{{"127.0.0.1", uint16(ln.Addr().(*net.TCPAddr).Port)}}
	var e *ear
	back := func(m string) { // from where the ear runs
		if strings.Contains(m, "could not be connected to again") {
			e.cfg.TLS = false
		}
	}
	if e, err = newEar(cfg, slog.New(hook{slog.DiscardHandler, back})); err != nil {
		t.Fatal(err)
	}
	states := make(chan string, 10)
	e.hear, e.asked = func(string, []byte) {}, func(time.Duration) {}
	e.up = func() { states <- "up" }
	e.down = func() { e.cfg.TLS, e.cfg.CACerts = true, "/nonexistent/ca.pem"; states <- "down" }
	var wg sync.WaitGroup
	stop := cancelled(t, &wg, e)
	defer wg.Wait()
	defer stop()
	for range 2 {
		upAndDown(t, ln, states)
	}
}

// TestARefusalHoldsInWhicheverOrderItIsTold: the client tells of it and of the connection on goroutines of their own. Only what says nothing of names may
// be refused.
func TestARefusalHoldsInWhicheverOrderItIsTold(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	conn, err := nats.Connect("nats://" + n.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, c := range []struct {
		refused string
		want    string
	}{
		{"", "up "}, {registration.SubjectRegister, "down "}, {registration.SubjectUnregister, "down "}, {registration.SubjectStart, "up "}, {registration.SubjectGreet, "up "},
	} {
		cfg := DefaultConfig()
		cfg.NATS.Hosts = []NATSHost{{"127.0.0.1", uint16(n.Port)}}
		e, err := newEar(cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		e.up, e.down = func() { said.WriteString("up ") }, func() { said.WriteString("down ") }
		e.conn.Store(conn)
		if c.refused != "" {
			e.complained(nil, fmt.Errorf("%w: Permissions Violation for Subscription to %q", nats.ErrPermissionViolation, c.refused))
		}
		e.stands()
		if said.String() != c.want || (e.trouble() != nil) != (c.want != "up ") {
			t.Errorf("%q is refused: said %q, trouble is %v, want %q", c.refused, said.String(), e.trouble(), c.want)
		}
		e.broke(nil)
		said.Reset()
		if e.stands(); said.String() != "up " || e.trouble() != nil {
			t.Errorf("after %q was refused on the connection before: said %q, trouble is %v, want up", c.refused, said.String(), e.trouble())
		}
	}
}

// TestARefusalIsNotForEver: who was given the right to hear is heard again without a restart, of the server or of us.
func TestARefusalIsNotForEver(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cfg := DefaultConfig()
	cfg.NATS.Hosts = []NATSHost{{"127.0.0.1", uint16(ln.Addr().(*net.TCPAddr).Port)}}
	e, err := newEar(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	states := make(chan string, 10)
	e.hear, e.asked = func(string, []byte) {}, func(time.Duration) {}
	e.up, e.down = func() { states <- "up" }, func() { states <- "down" }
	var wg sync.WaitGroup
	stop := cancelled(t, &wg, e)
	defer wg.Wait()
	defer stop()
	first := greetClient(t, ln)
	defer first.Close()
	fmt.Fprintf(first, "-ERR 'Permissions Violation for Subscription to %q'\r\n", registration.SubjectRegister)
	testkit.Until(t, 10*time.Second, "it is told", func() bool { return e.trouble() != nil })
	if err := ln.(*net.TCPListener).SetDeadline(time.Now().Add(6 * firstSaying)); err != nil {
		t.Fatal(err)
	}
	defer greetClient(t, ln).Close() // which refuses nothing
	testkit.Until(t, 10*time.Second, "it is heard", func() bool { return e.trouble() == nil })
	last := ""
	for len(states) > 0 {
		last = <-states
	}
	if last != "up" {
		t.Errorf("told last: %q, want up", last)
	}
}

// hook calls a function with each message of the log.
type hook struct {
	slog.Handler
	say func(string)
}

func (hook) Enabled(context.Context, slog.Level) bool { return true }

func (h hook) Handle(_ context.Context, r slog.Record) error {
	h.say(r.Message)
	return nil
}

func TestQuiet(t *testing.T) {
	var q quiet
	now := time.Unix(1000, 0)
	for i, c := range []struct {
		after  time.Duration
		hidden int
		ok     bool
	}{{0, 0, true}, {time.Second, 0, false}, {9 * time.Second, 0, false}, {10 * time.Second, 2, true}, {11 * time.Second, 0, false}, {time.Hour, 1, true}} {
		if hidden, ok := q.allow(now.Add(c.after)); hidden != c.hidden || ok != c.ok {
			t.Errorf("line %d: %d hidden, %v, want %d, %v", i, hidden, ok, c.hidden, c.ok)
		}
	}
}

func FuzzAdvertised(f *testing.F) {
	for _, s := range []string{`[]`, `null`, `{}`, `[{"name":"api.apps.internal","address":"10.255.1.1"}]`, `[{"name":"*.a","address":"::1"}]`, `[{"name":"","address":""}]`, `[{}]`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := readAdvertised(bytes.NewReader(b))
		if err != nil && !errors.Is(err, fault.Invalid) {
			t.Errorf("%v is no Invalid fault", err)
		}
		for _, p := range list {
			if n, err := registration.ParseName(string(p.name)); err != nil || n != p.name || !p.address.IsValid() || strings.HasSuffix(string(p.name), ".") {
				t.Errorf("accepted %+v", p)
			}
		}
	})
}
