package dns_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
)

const soon = 20 * time.Second

func TestNamesAreHeard(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	p, e := launch(t, settings(t, natsAt(n))), emit(t, n)
	p.counts(t, "silk_dns_nats_connected", "1")
	e.register(t, "10.255.1.1", "api.apps.internal", 0)
	e.register(t, "10.255.2.1", "API.apps.internal.", 1)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1 10.255.2.1")
	p.answers(t, soon, "1.API.Apps.Internal", "NOERROR 10.255.2.1")
	e.say(t, "unregister", payload("10.255.1.1", "api.apps.internal", 0))
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.2.1")
	p.answers(t, soon, "0.api.apps.internal", "NXDOMAIN")
	p.answers(t, soon, "other.apps.internal", "NXDOMAIN")
	p.answers(t, soon, "example.com", "REFUSED")
	for _, bad := range []string{"", "{", `{"host":"10.255.1.9"}`, `{"uris":["x.apps.internal"]}`, `{"host":"here","uris":["x.apps.internal"]}`, strings.Repeat(" ", 70_000) + "{}"} {
		e.say(t, "register", []byte(bad))
	}
	for _, a := range []string{"192.168.1.1", "127.0.0.1", "0.0.0.0", "169.254.169.254", "::1"} {
		e.register(t, a, "evil.apps.internal", 0)
	}
	p.counts(t, `silk_dns_rejected_total{reason="address"}`, "5")
	p.counts(t, `silk_dns_rejected_total{reason="malformed"}`, "6")
	p.answers(t, soon, "evil.apps.internal", "NXDOMAIN")
	p.counts(t, "silk_dns_names", "2")
	if n := strings.Count(p.Log(), "registration was refused"); n == 0 || n > 3 {
		t.Errorf("refusals have %d lines of the log, want few", n)
	}
	p.End(t)
}

// greeting is what sources are told.
type greeting struct {
	ID       string `json:"id"`
	Host     string `json:"host"`
	Interval int    `json:"minimumRegisterIntervalInSeconds"`
	Prune    int    `json:"pruneThresholdInSeconds"`
}

// TestGreetingsWaitForNothing floods registrations. The table is cold, which is no reason to let emitters wait either.
func TestGreetingsWaitForNothing(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	listener := emit(t, n)
	starts, err := listener.SubscribeSync("service-discovery.start")
	if err != nil {
		t.Fatal(err)
	}
	if err := listener.Flush(); err != nil {
		t.Fatal(err)
	}
	p := launch(t, settings(t, natsAt(n), object{"index": "7", "resume_pruning_delay_seconds": 45, "warm_duration_seconds": 60}))
	m, err := starts.NextMsg(soon)
	if err != nil {
		t.Fatal(err)
	}
	var begun greeting
	if err := json.Unmarshal(m.Data, &begun); err != nil {
		t.Fatal(err)
	}
	if a, err := netip.ParseAddr(begun.Host); err != nil || !strings.HasPrefix(begun.ID, "7-") || len(begun.ID) != 2+36 || begun.Interval != 45 || begun.Prune != 120 {
		t.Errorf("start is %+v from %v, %v", begun, a, err)
	}
	const total = 100_000
	e := emit(t, n)
	var wg sync.WaitGroup
	var slowest time.Duration
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			began := time.Now()
			m, err := listener.Request("service-discovery.greet", []byte("{}"), soon)
			if err != nil {
				t.Error(err)
				return
			}
			slowest = max(slowest, time.Since(began))
			var g greeting
			if json.Unmarshal(m.Data, &g) != nil || g != begun {
				t.Errorf("greeting is answered with %s, want what start said", m.Data)
			}
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	})
	for i := range total {
		e.register(t, address(i%60_000+1).String(), fmt.Sprintf("app-%d.apps.internal", i), 0)
	}
	if err := e.Flush(); err != nil {
		t.Fatal(err)
	}
	p.counts(t, `silk_dns_messages_total{subject="register"}`, fmt.Sprint(total))
	close(stop)
	wg.Wait()
	p.counts(t, "silk_dns_names", fmt.Sprint(2*total))
	p.counts(t, "silk_dns_messages_lost_total", "0")
	t.Logf("slowest answer to a greeting among %d registrations: %v; resident afterwards: %s bytes; processor time %s s", total, slowest,
		p.figure(t, "process_resident_memory_bytes"), p.figure(t, "process_cpu_seconds_total"))
	if slowest > 10*time.Second { // emitters wait for 30
		t.Errorf("a greeting was answered after %v, want at most 10 s", slowest)
	}
	p.answers(t, soon, "nobody.apps.internal", "SERVFAIL") // it is cold: that may be a name that was not told yet
	p.answers(t, soon, "app-99999.apps.internal", "NOERROR "+address(99_999%60_000+1).String())
}

// stream asks a server for names every millisecond until stop is called, which returns how many answers there were, and fails the test for every other answer than want.
func stream(t testing.TB, server, name, want string) (stop func() int) {
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var n atomic.Int64
	for range 4 {
		wg.Go(func() {
			turn := time.NewTicker(4 * time.Millisecond) // more would be load, and show no more moments
			defer turn.Stop()
			for failed := 0; failed < 3; <-turn.C {
				got, err := ask(ctx, server, name)
				if ctx.Err() != nil {
					return
				}
				if n.Add(1); err != nil || got != want {
					t.Errorf("a lookup has answer %q, %v, want %q", got, err, want)
					failed++
				}
			}
		})
	}
	return func() int {
		cancel()
		wg.Wait()
		return int(n.Load())
	}
}

// TestLookupsGoOnWithoutNATS kills the server, brings it back, and stops it where it is, under a stream of lookups.
func TestLookupsGoOnWithoutNATS(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	p := launch(t, settings(t, natsAt(n), object{"staleness_threshold_seconds": 3, "pruning_interval_seconds": 1, "resume_pruning_delay_seconds": 2}))
	e := emit(t, n, nats.PingInterval(100*time.Millisecond))
	p.counts(t, "silk_dns_nats_connected", "1")
	e.register(t, "10.255.1.1", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	stop := stream(t, p.DNS[0], "api.apps.internal", "NOERROR 10.255.1.1")
	away := func(what string) {
		t.Helper()
		p.counts(t, "silk_dns_nats_connected", "0")
		pause := time.NewTimer(6 * time.Second) // twice what makes a registration stale
		<-pause.C
		p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
		t.Log(what)
	}
	n.Kill()
	away("killed")
	if err := n.Restart(); err != nil {
		t.Fatal(err)
	}
	p.counts(t, "silk_dns_nats_connected", "1")
	e.register(t, "10.255.1.1", "api.apps.internal", 0)
	if err := n.Pause(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	p.counts(t, "silk_dns_nats_connected", "0")
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("a server that stands still was noticed after %v, want seconds", d)
	}
	away("stopped")
	if got := stop(); got < 100 {
		t.Errorf("only %d lookups were made", got)
	} else {
		t.Logf("%d lookups", got)
	}
	if err := n.Resume(); err != nil {
		t.Fatal(err)
	}
	p.counts(t, "silk_dns_nats_connected", "1")
	other := emit(t, n)
	talk := time.NewTicker(200 * time.Millisecond)
	defer talk.Stop()
	testkit.Within(t, 30*time.Second, func() string { // the source is well, and says nothing of it any more
		<-talk.C
		other.register(t, "10.255.1.2", "other.apps.internal", 0)
		if got, err := ask(t.Context(), p.DNS[0], "api.apps.internal"); err != nil || got != "NXDOMAIN" {
			return fmt.Sprintf("answer %q, %v, want NXDOMAIN", got, err)
		}
		return ""
	})
	p.answers(t, soon, "other.apps.internal", "NOERROR 10.255.1.2")
}

func TestNATSNeedNotBeThere(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	n.Kill()
	p := launch(t, settings(t, natsAt(n), object{"warm_duration_seconds": 1}))
	p.answers(t, soon, "api.apps.internal", "SERVFAIL") // nobody knows
	if err := n.Restart(); err != nil {
		t.Fatal(err)
	}
	p.counts(t, "silk_dns_warm", "1")
	p.answers(t, soon, "api.apps.internal", "NXDOMAIN")
	emit(t, n).register(t, "10.255.1.1", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	n.Kill()
	p.counts(t, "silk_dns_nats_connected", "0")
	p.End(t)
}

func TestPasswordOfNATS(t *testing.T) {
	const password = "p@ss/w?rd:%"
	n := testkit.StartNATS(t, testkit.NATSOptions{User: "us er", Password: password})
	with := func(user, pass string) object {
		o := natsAt(n)
		o["nats"].(object)["user"], o["nats"].(object)["pass"] = user, pass
		return o
	}
	p := launch(t, settings(t, with("us er", password)))
	p.counts(t, "silk_dns_nats_connected", "1")
	e := emit(t, n, nats.UserInfo("us er", password))
	e.register(t, "10.255.1.1", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")

	other := launch(t, settings(t, with("us er", "wrong")))
	testkit.Until(t, soon, "the server has refused us more often than other clients bear", func() bool {
		n, err := strconv.Atoi(other.figure(t, "silk_dns_nats_attempts_total"))
		return err == nil && n > 3 && strings.Contains(other.Log(), "Authorization Violation")
	})
	if strings.Contains(p.Log()+other.Log(), "p%40ss") || strings.Contains(p.Log()+other.Log(), password) {
		t.Error("the log has the password")
	}
}

func TestTLSOfNATS(t *testing.T) {
	ca, err := pki.OpenCA(filepath.Join(t.TempDir(), "pki"))
	if err != nil {
		t.Fatal(err)
	}
	issue := func(name string) (cert, key string) {
		t.Helper()
		cert, key, err := ca.Issue(name, netip.MustParseAddr("127.0.0.1"))
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	cert, key := issue("nats")
	n := testkit.StartNATS(t, testkit.NATSOptions{CA: ca.CertFile(), Cert: cert, Key: key})
	cert, key = issue("client")
	o := natsAt(n)
	for k, v := range map[string]any{"tls_enabled": true, "ca_certs": ca.CertFile(), "cert_chain": cert, "private_key": key} {
		o["nats"].(object)[k] = v
	}
	p := launch(t, settings(t, o))
	p.counts(t, "silk_dns_nats_connected", "1")
	e := emit(t, n, nats.RootCAs(ca.CertFile()), nats.ClientCert(cert, key))
	e.register(t, "10.255.1.1", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
}

// TestSeveralHearEverything: there are no queue groups.
func TestSeveralHearEverything(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	a, b, e := launch(t, settings(t, natsAt(n))), launch(t, settings(t, natsAt(n))), emit(t, n)
	a.counts(t, "silk_dns_nats_connected", "1")
	b.counts(t, "silk_dns_nats_connected", "1")
	e.register(t, "10.255.1.1", "api.apps.internal", 0)
	a.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	b.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
}

// TestARestartKeepsAnswers: killed or stopped, and NATS away: what was known is answered, and what was not is still said not to exist.
func TestARestartKeepsAnswers(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	cfg := settings(t, natsAt(n), object{"listen_dns": []string{fmt.Sprintf("127.0.0.1:%d", free(t))}, "warm_duration_seconds": 1})
	p, e := launch(t, cfg), emit(t, n)
	p.counts(t, "silk_dns_warm", "1")
	e.register(t, "10.255.1.1", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	n.Kill()
	p.End(t)
	for range 3 {
		p = launch(t, cfg)
		p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
		p.answers(t, soon, "0.api.apps.internal", "NOERROR 10.255.1.1")
		p.answers(t, soon, "other.apps.internal", "NXDOMAIN")
		p.Kill()
	}
}

// TestTheLastWordCounts: what is said of one container at once is heard in its order.
func TestTheLastWordCounts(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	p, e := launch(t, settings(t, natsAt(n))), emit(t, n)
	p.counts(t, "silk_dns_nats_connected", "1")
	const containers = 5000
	for i := range containers {
		for _, subject := range []string{"register", "unregister", "register", "unregister"}[i%2:] {
			e.say(t, subject, payload(address(i+1).String(), fmt.Sprintf("a%d.apps.internal", i), 0))
		}
	}
	for i := range containers {
		e.say(t, []string{"register", "unregister"}[i%2], payload(address(i+1).String(), fmt.Sprintf("a%d.apps.internal", i), 0))
	}
	p.counts(t, `silk_dns_messages_total{subject="unregister"}`, fmt.Sprint(containers*2+containers/2))
	p.counts(t, `silk_dns_messages_total{subject="register"}`, fmt.Sprint(containers/2*2+containers/2+containers/2))
	p.counts(t, "silk_dns_names", fmt.Sprint(containers))
	p.counts(t, "silk_dns_registrations", fmt.Sprint(containers))
}

// TestWhoMayNotListenKnowsNothing: a user without rights to hear registrations is connected, and yet not well.
func TestWhoMayNotListenKnowsNothing(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{Config: `authorization { users = [
		{ user: "deaf", password: "x", permissions: { publish: ">", subscribe: { deny: "service-discovery.register" } } } ] }`})
	o := natsAt(n)
	o["nats"].(object)["user"], o["nats"].(object)["pass"] = "deaf", "x"
	p := launch(t, settings(t, o, object{"warm_duration_seconds": 2}))
	p.counts(t, "silk_dns_healthy", "0")
	testkit.Until(t, soon, "it is said", func() bool { return strings.Contains(p.Log(), "ermissions") })
	pause := time.NewTimer(3 * time.Second)
	<-pause.C
	p.counts(t, "silk_dns_warm", "0")
	p.answers(t, soon, "api.apps.internal", "SERVFAIL")
}
