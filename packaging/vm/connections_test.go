package vm

import (
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	held    = 10_000 // connections
	clients = 4      // containers that they come from
	callers = 32     // that make them at a time
)

// metric returns a value that silk-tls shows.
func metric(name string) string {
	body, _ := get("127.0.0.1:8057/metrics")
	for line := range strings.Lines(body) {
		if v, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func awaitConnections(t *testing.T, n int) {
	t.Helper()
	await(t, fmt.Sprintf("%d connections", n), func() bool { return metric("silk_tls_connections") == fmt.Sprint(n) })
}

// state returns silk-tls's resident memory in KiB after garbage collections, and its descriptors.
func state(t *testing.T) (resident, files int) {
	t.Helper()
	for range 3 { // stacks shrink by half each time
		get("127.0.0.1:8057/debug/pprof/heap?gc=1")
	}
	out := run(t, "pid=$(systemctl show -P MainPID silk-tls); awk '/^VmRSS/{print $2}' /proc/$pid/status; ls /proc/$pid/fd | wc -l")
	if _, err := fmt.Sscan(out, &resident, &files); err != nil {
		t.Fatal(err)
	}
	return resident, files
}

// latency is that of a connection from nothing to the first byte that comes back, with a full handshake: the median of 21.
func latency(t *testing.T, web []container, api container, cfg *tls.Config) time.Duration {
	t.Helper()
	var all []time.Duration
	for k := range 21 {
		start := time.Now()
		c, err := web[k%len(web)].dial(api, cfg)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, time.Since(start))
		c.Close()
	}
	slices.Sort(all)
	return all[len(all)/2].Round(100 * time.Microsecond)
}

// hold makes the connections.
func hold(t *testing.T, web []container, api container, cfg *tls.Config) []*tls.Conn {
	t.Helper()
	conns, errs, start := make([]*tls.Conn, held), make([]error, callers), time.Now()
	var wg sync.WaitGroup
	for k := range callers {
		wg.Go(func() {
			for i := k; i < held && errs[k] == nil; i += callers {
				conns[i], errs[k] = web[i%len(web)].dial(api, cfg)
				if i%1000 == 0 {
					t.Logf("%d after %v", i, time.Since(start).Round(time.Second))
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("with %s connections: %v", metric("silk_tls_connections"), err)
	}
	return conns
}

// tenThousandConnections go through silk-tls as its unit starts it, from four containers to one: all are held, a new one works beside them, and they end
// when their clients close them and when their container goes.
func tenThousandConnections(t *testing.T) {
	api := attach(t, "api", "api")
	api.echo(t)
	var web []container
	for k := range clients {
		web = append(web, attach(t, fmt.Sprintf("web%d", k), "web"))
	}
	run(t, "silk policy add web api --ports 61443 --wait --timeout 60s")
	full := &tls.Config{RootCAs: roots(t), ServerName: "api.apps.internal", CurvePreferences: []tls.CurveID{tls.X25519}}
	resumed := full.Clone() // less to compute on a machine that is emulated
	resumed.ClientSessionCache = tls.NewLRUClientSessionCache(0)
	await(t, "a connection", func() bool {
		c, err := web[0].dial(api, resumed)
		if err != nil {
			t.Log(err)
			return false
		}
		return c.Close() == nil
	})
	alone := latency(t, web, api, full)
	awaitConnections(t, 0)
	before, files := state(t)

	conns := hold(t, web, api, resumed)
	awaitConnections(t, held)
	after, most := state(t)
	t.Logf("silk-tls: %d descriptors (before: %d), VmRSS %d KiB (before: %d), %.1f KiB for each of %d connections", most, files, after, before, float64(after-before)/held, held)
	t.Logf("a new connection: %v beside them, %v without", latency(t, web, api, full), alone)
	for i := 0; i < held; i += held / 100 {
		if err := answers(conns[i]); err != nil {
			t.Errorf("connection %d: %v", i, err)
		}
	}

	for _, c := range conns[:held/2] {
		c.Close()
	}
	awaitConnections(t, held/2)
	start := time.Now()
	api.detach(t)
	awaitConnections(t, 0)
	t.Logf("%d ended within %v of the beginning of the container's end", held/2, time.Since(start).Round(time.Millisecond))
	resident, left := state(t)
	t.Logf("afterwards: %d descriptors, VmRSS %d KiB", left, resident)
	if left > files {
		t.Errorf("%d descriptors are left of %d", left, files)
	}
	for _, c := range conns[held/2:] {
		c.NetConn().Close()
	}
}
