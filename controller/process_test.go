package controller_test

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/controller"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
)

// process is a controller in a process of its own.
type process struct {
	*testkit.Process
	controller.Addresses
}

// launch writes cfg to a file, runs bin with it and waits until it serves.
func launch(t testing.TB, bin string, cfg controller.Config) *process {
	t.Helper()
	b, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return launchFile(t, bin, b)
}

// launchFile is launch with the text of a configuration.
func launchFile(t testing.TB, bin string, text []byte) *process {
	t.Helper()
	file := filepath.Join(t.TempDir(), "controller.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	p := new(process)
	p.Process = testkit.Launch(t, exec.Command(bin, "-config", file), nil, &p.Addresses)
	return p
}

func TestTheProgramEndsCleanlyOnSignals(t *testing.T) {
	bin, c := testkit.Program(t, "silk-controller"), issue(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		cfg := c.config(sqldb.Config{Type: sqldb.SQLite, Path: filepath.Join(t.TempDir(), "silk.db")})
		p := launch(t, bin, cfg)
		if status, body := get(t, p.Health, "/health"); status != 200 || body != "" {
			t.Errorf("health: %d %q, want 200 and nothing", status, body)
		}
		if status, _ := get(t, p.Debug, "/debug/pprof/"); status != 200 {
			t.Errorf("pprof: %d, want 200", status)
		}
		k := dial(t, c, p.API)
		u, err := k.Watch(t.Context(), lease.Revision{})
		if err != nil {
			t.Fatal(err)
		}
		waits := make(chan error, 1)
		go func() {
			_, err := k.Watch(t.Context(), u.Revision)
			waits <- err
		}()
		start := time.Now()
		p.Cmd.Process.Signal(sig)
		if err := p.Wait(); err != nil || !strings.Contains(p.Log(), `"msg":"exited"`) || time.Since(start) > 5*time.Second {
			t.Errorf("%v: ended with %v after %v", sig, err, time.Since(start))
		}
		if err := <-waits; err != nil && !errors.Is(err, fault.Unavailable) {
			t.Errorf("%v: a waiting daemon saw %v, want unavailable", sig, err)
		}
	}
}

func TestTheProgramSaysWhyItCannotStart(t *testing.T) {
	bin, c := testkit.Program(t, "silk-controller"), issue(t)
	good := c.config(sqldb.Config{Type: sqldb.SQLite, Path: filepath.Join(t.TempDir(), "silk.db")})
	for name, test := range map[string]struct {
		spoil func(*controller.Config)
		want  string
	}{
		"no certificate": {func(c *controller.Config) { c.ServerCertFile = "/nonexistent.crt" }, "/nonexistent.crt"},
		"bad network":    {func(c *controller.Config) { c.Network = netip.MustParsePrefix("10.255.0.0/24") }, "10.255.0.0/24"},
		"no directory":   {func(c *controller.Config) { c.Database.Path = "/proc/silk/silk.db" }, "/proc/silk"},
		"engine":         {func(c *controller.Config) { c.Database.Type = "oracle" }, `"oracle"`},
		"address":        {func(c *controller.Config) { c.ListenHost = "192.0.2.1" }, "192.0.2.1"},
	} {
		cfg := good
		db := *good.Database
		db.Timeout = 1
		cfg.Database = &db
		test.spoil(&cfg)
		b, err := json.Marshal(cfg)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "controller.json")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(bin, "-config", file)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		err = cmd.Run()
		if cmd.ProcessState.ExitCode() != 1 || !strings.HasPrefix(stderr.String(), "silk-controller error: ") || !strings.Contains(stderr.String(), test.want) {
			t.Errorf("%s: %v, standard error %q, want exit 1 naming %q", name, err, stderr.String(), test.want)
		}
	}
}

// promise is what a killed controller told a host, or was about to.
type promise struct {
	lease    lease.Lease // the last lease that was acknowledged
	released bool        // the release was acknowledged
	open     bool        // a request was under way: it may or may not have happened
}

// TestNoLeaseIsLostOrGivenTwiceWhenKilled kills the program at random instants under load. What it acknowledged stands afterwards.
func TestNoLeaseIsLostOrGivenTwiceWhenKilled(t *testing.T) {
	bin, rounds := testkit.Program(t, "silk-controller"), 25
	if testing.Short() {
		rounds = 6
	}
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		cfg := c.config(db)
		cfg.Network = netip.MustParsePrefix("10.0.0.0/8")
		promises := map[netip.Addr]*promise{}
		next := 0
		for range rounds {
			p := launch(t, bin, cfg)
			checkPromises(t, dial(t, c, p.API), promises)
			var mu sync.Mutex
			var wg sync.WaitGroup
			for range 8 {
				k := dial(t, c, p.API)
				wg.Go(func() {
					for {
						mu.Lock()
						next++
						h, pr := host(next), &promise{}
						promises[h] = pr
						mu.Unlock()
						if !makeAndKeep(t, k, h, pr) {
							return
						}
					}
				})
			}
			pause := time.NewTimer(50*time.Millisecond + rand.N(200*time.Millisecond))
			<-pause.C
			p.Kill()
			wg.Wait()
		}
		p := launch(t, bin, cfg)
		n := checkPromises(t, dial(t, c, p.API), promises)
		t.Logf("%d hosts, %d leases", len(promises), n)
		if n < 10 {
			t.Errorf("only %d leases were made: the test shows nothing", n)
		}
	})
}

// makeAndKeep lets a host get a lease, renew it and, every third one, release it. It returns false when the controller is gone.
func makeAndKeep(t *testing.T, k *leasehttp.Client, h netip.Addr, pr *promise) bool {
	pr.open = true
	l, err := k.Acquire(t.Context(), h, lease.Block)
	if err != nil {
		return ended(t, err)
	}
	pr.lease, pr.open = l, false
	if err := k.Renew(t.Context(), l); err != nil {
		return ended(t, err)
	}
	if h.As4()[3]%3 != 0 {
		return true
	}
	pr.open = true
	if err := k.Release(t.Context(), h); err != nil {
		return ended(t, err)
	}
	pr.open, pr.released = false, true
	return true
}

// ended returns false, and complains of an error that a killed controller cannot be the reason of.
func ended(t *testing.T, err error) bool {
	if !errors.Is(err, fault.Unavailable) {
		t.Error(err)
	}
	return false
}

// checkPromises compares the list with what was acknowledged and returns its length.
func checkPromises(t *testing.T, k *leasehttp.Client, promises map[netip.Addr]*promise) int {
	t.Helper()
	got := map[netip.Addr]lease.Lease{}
	taken := map[netip.Prefix]netip.Addr{}
	ls := leases(t, k)
	for _, l := range ls {
		if other, twice := taken[l.Subnet]; twice {
			t.Errorf("%v is given to %v and to %v", l.Subnet, other, l.Underlay)
		}
		if _, twice := got[l.Underlay]; twice {
			t.Errorf("%v has two leases", l.Underlay)
		}
		got[l.Underlay], taken[l.Subnet] = l, l.Underlay
	}
	for h, pr := range promises {
		l, there := got[h]
		switch {
		case pr.open && pr.lease == lease.Lease{}: // an acquire that may or may not have happened
			pr.lease, pr.open, pr.released = l, false, !there
		case pr.open: // a release that may or may not have happened
			pr.open, pr.released = false, !there
		case pr.released && there:
			t.Errorf("%v is listed after its release", l)
		case !pr.released && l != pr.lease:
			t.Errorf("%v was told %v and has %v", h, pr.lease, l)
		}
	}
	for h := range got {
		if promises[h] == nil {
			t.Errorf("%v has a lease that it never asked for", h)
		}
	}
	return len(ls)
}

// TestTheEpochIsRenewedByCommand: what an operator runs after a restore, while controllers run.
func TestTheEpochIsRenewedByCommand(t *testing.T) {
	bin := testkit.Program(t, "silk-controller")
	each(t, func(t *testing.T, db sqldb.Config) {
		c := issue(t)
		cfg := c.config(db)
		k := start(t, c, cfg, quiet(t)).client(t)
		l := acquire(t, k, 1, lease.Block)
		before, err := k.Watch(t.Context(), lease.Revision{})
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(cfg)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "controller.json")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(bin, "-config", file, "-renew-epoch").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		var after lease.Update
		eventually(t, "a watcher is told of the new epoch", func() bool {
			if after, err = k.Watch(t.Context(), before.Revision); err != nil {
				t.Fatal(err)
			}
			return after.Revision.Epoch != before.Revision.Epoch
		})
		if !after.Full || !slices.Equal(after.Set, []lease.Lease{l}) {
			t.Errorf("told %+v, want the full list", after)
		}
	})
}
