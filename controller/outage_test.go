package controller_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/controller"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
)

// TestADatabaseThatIsAwayIsNeverAConflict stops PostgreSQL under load: hosts see 5xx only, health says so, and all is well again when the
// database is back.
func TestADatabaseThatIsAwayIsNeverAConflict(t *testing.T) {
	testkit.Postgres(t) // skips where there is none
	server, err := testkit.StartPostgres(t.Context(), testkit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Stop)
	db, err := server.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := issue(t)
	cfg := c.config(db)
	cfg.Network, cfg.StalenessThreshold = netip.MustParsePrefix("10.0.0.0/10"), 1 // every renewal is written
	r := start(t, c, cfg, slog.New(slog.DiscardHandler))

	const hosts = 8
	var before [hosts]lease.Lease
	for n := range hosts {
		before[n] = acquire(t, r.client(t), n+1, lease.Block)
	}
	load := newLoad(t, r, before[:])
	eventually(t, "renewals succeed", func() bool { return load.good.Load() > 100 })
	server.Kill()
	eventually(t, "renewals fail", func() bool { return load.failed.Load() > 0 })
	eventually(t, "health tells", func() bool {
		status, body := get(t, r.Health, "/health")
		return status == 500 && body == `{"error": "check database failed"}`
	})
	eventually(t, "metrics tell", func() bool { return metric(t, r, "silk_controller_database_up") == 0 })
	eventually(t, "the list fails", func() bool {
		_, err := r.client(t).Leases(t.Context())
		return err != nil
	})
	if err := server.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	mark := load.good.Load()
	eventually(t, "renewals succeed again", func() bool { return load.good.Load() > mark+100 })
	load.stop()
	eventually(t, "health is well", func() bool { status, _ := get(t, r.Health, "/health"); return status == 200 })
	k := r.client(t)
	for n := range hosts {
		if l := acquire(t, k, n+1, lease.Block); l != before[n] {
			t.Errorf("host has %v after the outage, had %v", l, before[n])
		}
	}
	if metric(t, r, "silk_controller_database_errors_total") == 0 {
		t.Error("no database error was counted")
	}
}

// load renews leases, acquires and releases others, and checks what kind failures are of.
type load struct {
	good, failed atomic.Int64
	quit         chan struct{}
	wg           sync.WaitGroup
	once         sync.Once
}

func newLoad(t *testing.T, r *running, ls []lease.Lease) *load {
	l := &load{quit: make(chan struct{})}
	for i, held := range ls {
		k := leasehttp.NewClient("https://"+r.API, r.certs.tls(t), leasehttp.ClientOptions{Timeout: 20 * time.Second})
		l.wg.Go(func() {
			defer k.Close()
			for n := 0; ; n++ {
				select {
				case <-l.quit:
					return
				default:
				}
				err := k.Renew(context.Background(), held)
				l.note(t, err)
				if n%10 == 0 {
					other := host(1000 + 1000*i + n%100)
					_, err := k.Acquire(context.Background(), other, lease.Block)
					l.note(t, err)
					l.note(t, k.Release(context.Background(), other))
				}
			}
		})
	}
	t.Cleanup(l.stop)
	return l
}

func (l *load) note(t *testing.T, err error) {
	if err == nil {
		l.good.Add(1)
		return
	}
	l.failed.Add(1)
	se, answered := errors.AsType[*httpjson.StatusError](err)
	if errors.Is(err, fault.Conflict) || errors.Is(err, fault.Exhausted) || answered && se.Status/100 != 5 {
		t.Errorf("a database that is away was answered: %v", err)
	}
	if answered && strings.ContainsAny(se.Text, "\n") || answered && strings.Contains(se.Text, "postgres") {
		t.Errorf("the cause was told to the caller: %q", se.Text)
	}
}

func (l *load) stop() {
	l.once.Do(func() { close(l.quit) })
	l.wg.Wait()
}

func TestControllersThatStartAtOnceAgreeOnTheSchema(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		begun := make([]func() *running, 4)
		for i := range begun {
			begun[i] = begin(t, c, c.config(db), quiet(t))
		}
		rs := make([]*running, len(begun))
		for i, serving := range begun {
			rs[i] = serving()
		}
		l := acquire(t, rs[0].client(t), 1, lease.Block)
		for _, r := range rs {
			k := r.client(t)
			eventually(t, "each controller lists the lease", func() bool { return strings.Contains(networks(leases(t, k)), l.Subnet.String()) })
		}
	})
}

// TestOneControllerTellsTheWatchersOfAnother: what one does is known to those who watch another within a second.
func TestOneControllerTellsTheWatchersOfAnother(t *testing.T) {
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		a, b := start(t, c, c.config(db), quiet(t)).client(t), start(t, c, c.config(db), quiet(t)).client(t)
		u, err := b.Watch(t.Context(), lease.Revision{})
		if err != nil {
			t.Fatal(err)
		}
		var l lease.Lease
		acquired := make(chan time.Time, 1)
		go func() {
			l, err = a.Acquire(t.Context(), host(1), lease.Block)
			acquired <- time.Now()
		}()
		told, werr := b.Watch(t.Context(), u.Revision)
		took := time.Since(<-acquired)
		if err != nil || werr != nil || len(told.Set) != 1 || told.Set[0] != l {
			t.Fatalf("told %+v, %v after %v, %v", told, werr, l, err)
		}
		if took > time.Second {
			t.Errorf("told after %v, want at most a second", took)
		}
	})
}

func TestWithoutADatabaseItWaitsSaysSoAndGivesUp(t *testing.T) {
	c := issue(t)
	port, err := testkit.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	cfg := c.config(sqldb.Config{Type: sqldb.Postgres, Host: "127.0.0.1", Port: uint16(port), User: "silk", Name: "silk", Timeout: 2})
	start := time.Now()
	err = controller.Run(t.Context(), cfg, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "connect to the database") || !errors.Is(err, fault.Unavailable) {
		t.Errorf("%v, want to be told of the database", err)
	}
	if took := time.Since(start); took < 1500*time.Millisecond || took > 10*time.Second {
		t.Errorf("gave up after %v, want its two seconds", took)
	}

	// Meanwhile health says no, and a stop is a clean one.
	db := *cfg.Database
	db.Timeout = 60
	cfg.Database = &db
	if cfg.HealthCheckPort, err = testkit.FreePort(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- controller.Run(ctx, cfg, slog.New(slog.DiscardHandler)) }()
	addr := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(cfg.HealthCheckPort)).String()
	eventually(t, "health is served", func() bool {
		k, err := net.Dial("tcp", addr)
		if err == nil {
			k.Close()
		}
		return err == nil
	})
	if status, body := get(t, addr, "/health"); status != 500 || body != `{"error": "check database failed"}` {
		t.Errorf("health: %d %q, want 500", status, body)
	}
	if status, body := get(t, addr, "/metrics"); status != 200 || !strings.Contains(body, "\nsilk_controller_database_up 0\n") {
		t.Errorf("metrics: %d, want the database down", status)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("stopped while it waited: %v, want nil", err)
	}
}

// lines is a log that can be searched.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

// with returns the records that have a message.
func (l *lines) with(t *testing.T, msg string) (found []map[string]any) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(l.b.Bytes()) {
		var r map[string]any
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatal(err)
		}
		if r["msg"] == msg {
			found = append(found, r)
		}
	}
	return found
}

func TestAFillingRangeIsToldOncePerStep(t *testing.T) {
	c := issue(t)
	cfg := c.config(testkit.Database(t, sqldb.SQLite))
	cfg.Network, cfg.SubnetPrefixLength = netip.MustParsePrefix("10.255.0.0/24"), 29 // 31 blocks
	log := new(lines)
	r := start(t, c, cfg, slog.New(slog.NewJSONHandler(log, nil)))
	k := r.client(t)
	const msg = "the overlay range is filling up: enlarge network or release what is not used"
	given := 0
	for i, step := range []struct{ hosts, percent int }{{22, 70}, {27, 85}, {31, 95}} {
		for ; given < step.hosts; given++ {
			acquire(t, k, given+1, lease.Block)
		}
		eventually(t, "the step shows in the metric", func() bool {
			return metric(t, r, `silk_controller_range_alarm_percent{kind="block"}`) == float64(step.percent)
		})
		told := log.with(t, msg)
		if len(told) != i+1 || told[i]["percent"] != float64(step.percent) || told[i]["kind"] != "block" || told[i]["level"] != "WARN" {
			t.Errorf("at %d of 31: told %v, want one warning more, of %d percent", given, told, step.percent)
		}
	}
	for n := range 31 {
		if err := k.Release(t.Context(), host(n+1)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the alarm ends", func() bool { return metric(t, r, `silk_controller_range_alarm_percent{kind="block"}`) == 0 })
	if n := len(log.with(t, msg)); n != 3 {
		t.Errorf("%d warnings, want 3", n)
	}
}

func TestOnlyCertificatesOfTheAuthorityGetIn(t *testing.T) {
	c, strangers := issue(t), issue(t)
	r := start(t, c, c.config(testkit.Database(t, sqldb.SQLite)), slog.New(slog.DiscardHandler))
	for name, version := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		tc := c.tls(t)
		tc.MinVersion, tc.MaxVersion = version, version
		k := leasehttp.NewClient("https://"+r.API, tc, leasehttp.ClientOptions{})
		if _, err := k.Leases(t.Context()); err != nil {
			t.Errorf("TLS %s with ECDSA keys: %v", name, err)
		}
		k.Close()
	}
	old, none, foreign, plain := c.tls(t), c.tls(t), c.tls(t), "http://"+r.API
	old.MinVersion, old.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
	none.GetClientCertificate = nil
	foreign.GetClientCertificate = strangers.tls(t).GetClientCertificate
	for name, tc := range map[string]*tls.Config{"TLS 1.1": old, "no certificate": none, "foreign certificate": foreign, "wrong authority": strangers.tls(t)} {
		k := leasehttp.NewClient("https://"+r.API, tc, leasehttp.ClientOptions{})
		if ls, err := k.Leases(t.Context()); err == nil {
			t.Errorf("%s: got %v", name, ls)
		}
		k.Close()
	}
	k := leasehttp.NewClient(plain, nil, leasehttp.ClientOptions{})
	defer k.Close()
	if ls, err := k.Leases(t.Context()); err == nil {
		t.Errorf("without TLS: got %v", ls)
	}
}

func TestTheLogLevelCanBeChanged(t *testing.T) {
	c := issue(t)
	cfg := c.config(sqldb.Config{Type: sqldb.SQLite, Path: filepath.Join(t.TempDir(), "silk.db")})
	cfg.Level = new(slog.LevelVar)
	log := new(lines)
	r := start(t, c, cfg, slog.New(slog.NewJSONHandler(log, &slog.HandlerOptions{Level: cfg.Level})))
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	k := leasehttp.NewClient("https://"+r.API, c.tls(t), leasehttp.ClientOptions{Traceparent: parent})
	defer k.Close()
	if _, err := k.Leases(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := log.with(t, "request served"); got != nil {
		t.Errorf("at info a request was logged: %v", got)
	}
	if status := post(t, r.Debug, "/log-level", "debug"); status != 200 {
		t.Errorf("log level: %d, want 200", status)
	}
	if _, err := k.Leases(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "requests are logged with their trace", func() bool {
		got := log.with(t, "request served")
		return len(got) == 1 && got[0]["traceparent"] == parent && got[0]["path"] == "/leases"
	})
}
