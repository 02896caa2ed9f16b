package policysql_test

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
)

// guid returns the name of group n, as long as those of Cloud Foundry.
func guid(n int) identity.Group {
	return identity.Group(fmt.Sprintf("%08x-59d3-4c9c-a1cd-%012x", n*2654435761&0xffffffff, n))
}

const benchGroups, benchPolicies = 20000, 62000

func benchPolicy(i int) policy.Policy {
	return policy.Policy{Source: guid(i % benchGroups), Destination: guid((i*7 + i/benchGroups) % benchGroups), Protocol: policy.TCP, Ports: policy.Ports{First: 8080, Last: 8080}}
}

// large returns a store with 62,000 policies among 20,000 groups on a PostgreSQL of its own that writes through to the disk, opened as after a restart.
func large(b *testing.B) (*policysql.Store, *testkit.Server, sqldb.Config) {
	b.Helper()
	server, err := testkit.StartPostgres(b.Context(), testkit.Options{Durable: true})
	testkit.Require(b, "postgres", err)
	b.Cleanup(server.Stop)
	db, err := server.NewDatabase(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	s, stop := start(b, config(db))
	ps := make([]policy.Policy, benchPolicies)
	for i := range ps {
		ps[i] = benchPolicy(i)
	}
	create(b, s, ps...)
	stop()
	return open(b, config(db)), server, db
}

// groupsOf returns the groups of a host with n containers.
func groupsOf(host, n int) []identity.Group {
	groups := make([]identity.Group, n)
	for i := range groups {
		groups[i] = guid((host*97 + i*131) % benchGroups)
	}
	return groups
}

// BenchmarkRead asks for what agents and people ask for, and says what is resident.
func BenchmarkRead(b *testing.B) {
	s, _, _ := large(b)
	debug.FreeOSMemory()
	b.Run("query-100-groups", func(b *testing.B) {
		i := 0
		for b.Loop() {
			i++
			if rs, err := s.Rules(b.Context(), policy.Filter{Either: groupsOf(i, 100)}); err != nil || len(rs) < 100 {
				b.Fatal(len(rs), err)
			}
		}
	})
	b.Run("all", func(b *testing.B) {
		for b.Loop() {
			sn, err := s.Snapshot(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			n := 0
			for r := range sn.All() {
				n += int(r.SourceTag) & 1
			}
		}
	})
	b.Run("watch-full-100-groups", func(b *testing.B) {
		i := 0
		for b.Loop() {
			i++
			if u, err := s.Watch(b.Context(), policy.Ask{Groups: groupsOf(i, 100)}); err != nil || !u.Full {
				b.Fatal(u, err)
			}
		}
	})
	b.Run("resident", func(b *testing.B) {
		for b.Loop() {
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		b.ReportMetric(float64(m.HeapAlloc)/(1<<20), "heap-MiB")
		b.ReportMetric(resident(b), "resident-MiB")
	})
}

// resident returns what the process has resident, in MiB; the test's own data is in it.
func resident(b *testing.B) float64 {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		b.Fatal(err)
	}
	return float64(kib) / 1024
}

// BenchmarkCreate has 8 clients create one policy a request, beside what pgbench commits with as many.
func BenchmarkCreate(b *testing.B) {
	s, server, db := large(b)
	raw := connect(b, db)
	exec(b, raw, "CREATE TABLE baseline (LIKE silk_policies INCLUDING ALL)")
	script := b.TempDir() + "/script"
	text := "\\set i random(1, 60000)\n\\set j random(1, 2000000000)\nINSERT INTO baseline VALUES (:i, :j, 6, 1, 1, 0, 1) ON CONFLICT DO NOTHING;\n"
	if err := os.WriteFile(script, []byte(text), 0o644); err != nil {
		b.Fatal(err)
	}
	next := benchPolicies
	for b.Loop() {
		tps, err := server.PGBench(b.Context(), db.Name, script, 8, 4*time.Second, true)
		if err != nil {
			b.Fatal(err)
		}
		const n = 8000
		var at atomic.Int64
		at.Store(int64(next))
		next += n
		var wg sync.WaitGroup
		begin := time.Now()
		for range 8 {
			wg.Go(func() {
				for i := int(at.Add(1)); i <= next; i = int(at.Add(1)) {
					if _, err := s.CreateWithin(b.Context(), []policy.Policy{benchPolicy(i)}, 150); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		rate := n / time.Since(begin).Seconds()
		b.ReportMetric(tps, "pgbench/s")
		b.ReportMetric(rate, "create/s")
		b.ReportMetric(rate/tps, "of-pgbench")
	}
}

// BenchmarkWake has 2,000 agents with 100 groups each wait among 62,000 policies: what a change costs that touches one of them, or all.
func BenchmarkWake(b *testing.B) {
	s, _, _ := large(b)
	const agents = 2000
	hub := identity.Group("hub")
	heard := make(chan time.Time, agents)
	for i := range agents {
		go func() {
			a := policy.Ask{Host: fmt.Sprintf("10.0.%d.%d", i/250, i%250), Groups: append(groupsOf(i, 100), hub, identity.Group(fmt.Sprintf("only-%d", i)))}
			for {
				u, err := s.Watch(b.Context(), a)
				if err != nil {
					return
				}
				a.Since, a.InForce = u.Revision, u.Revision
				if u.Changes() && !u.Full {
					heard <- time.Now()
				}
			}
		}()
	}
	for s.Stats().Watchers < agents {
		runtime.Gosched()
	}
	runtime.GC()
	b.Logf("%d agents wait: %.0f MiB resident", agents, resident(b))
	for name, c := range map[string]struct {
		policy policy.Policy
		n      int
	}{
		"one-agent": {policy.Policy{Source: "only-7", Destination: "only-7", Protocol: policy.UDP}, 1},
		"all":       {policy.Policy{Source: hub, Destination: hub, Protocol: policy.UDP}, agents},
	} {
		port := uint16(0)
		b.Run(name, func(b *testing.B) {
			var last time.Duration
			for b.Loop() {
				b.StopTimer()
				for s.Stats().Watchers < agents {
					runtime.Gosched()
				}
				b.StartTimer()
				port++
				c.policy.Ports = policy.Ports{First: port, Last: port}
				create(b, s, c.policy)
				answered := time.Now()
				for range c.n {
					last = max(last, (<-heard).Sub(answered))
				}
			}
			b.ReportMetric(float64(last.Microseconds())/1000, "answer-to-last-agent-ms")
		})
	}
}
