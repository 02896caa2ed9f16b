// Package leasebench measures the control plane of leases: a silk-controller in a process of its own over PostgreSQL with
// durable commits, 16 clients over mutual TLS, 10,000 leases held in 10.0.0.0/8.
//
// New leases and renewals are compared with what pgbench commits on the same server as single-row transactions of the same
// kind, in rounds that alternate: by its own defaults, which is what is promised, and with prepared statements, which costs the server less and is shown
// beside it. Use: leasebench.Run(ctx, report), or make bench ONLY=lease.
package leasebench

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/bench/load"
	"code.cloudfoundry.org/silk/bench/server"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/lease/leasehttp"
)

const (
	held    = 10000
	clients = 16
	waiting = 5000
	rounds  = 5
	round   = 2 * time.Second
	fetches = 200
)

// Run measures and fills r. It needs the server programs of PostgreSQL and the go command.
func Run(ctx context.Context, r *bench.Report) error {
	dir, err := os.MkdirTemp("", "silk-leasebench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b, err := prepare(ctx, dir)
	if err != nil {
		return err
	}
	defer b.server.Stop()
	return errors.Join(b.memory(ctx, r), b.throughput(ctx, r))
}

type run struct {
	dir       string
	bin       string
	server    *testkit.Server
	ca        *pki.CA
	cert, key string
	tls       *tls.Config
	hosts     atomic.Uint32
}

func prepare(ctx context.Context, dir string) (*run, error) {
	b := &run{dir: dir}
	var err error
	if b.bin, err = server.Build(ctx, dir, "silk-controller"); err != nil {
		return nil, err
	}
	if b.ca, err = pki.OpenCA(filepath.Join(dir, "pki")); err != nil {
		return nil, err
	}
	if b.cert, b.key, err = b.ca.Issue("localhost", netip.MustParseAddr("127.0.0.1")); err != nil {
		return nil, err
	}
	if b.tls, err = (service.Certificates{CA: b.ca.CertFile(), Cert: b.cert, Key: b.key}).Client(); err != nil {
		return nil, err
	}
	b.server, err = testkit.StartPostgres(ctx, testkit.Options{Durable: true})
	return b, err
}

// host returns the underlay address of another host.
func (b *run) host() string {
	n := b.hosts.Add(1)
	return netip.AddrFrom4([4]byte{172, byte(16 + n>>16), byte(n >> 8), byte(n)}).String()
}

// on runs f against a controller of its own over db, with clients connected.
func (b *run) on(ctx context.Context, db sqldb.Config, more map[string]any, f func(p *process, l *load.Load) error) error {
	p, err := b.start(ctx, db, more)
	if err != nil {
		return err
	}
	l, err := load.DialAll(ctx, p.API, b.tls, clients, func(*load.Client) error { return nil })
	if err != nil {
		return errors.Join(err, p.Stop())
	}
	err = f(p, l)
	l.Close()
	return errors.Join(err, p.Stop())
}

// fill lets 10,000 hosts get their leases and returns those as JSON.
func (b *run) fill(l *load.Load) ([]string, error) {
	leases := make([]string, held)
	err := l.Each(held, func(c *load.Client, i int) error {
		body, err := c.Call("PUT", leasehttp.PathAcquire, acquire(b.host()))
		leases[i] = string(body)
		return err
	})
	return leases, err
}

func acquire(host string) string { return `{"underlay_ip":"` + host + `"}` }

// throughput measures what is judged against pgbench, and the list.
func (b *run) throughput(ctx context.Context, r *bench.Report) error {
	db, err := b.server.NewDatabase(ctx)
	if err != nil {
		return err
	}
	pg := server.NewBaseline(b.server, b.dir, baselineTable, baselineRows, held, clients, round)
	inserts, err1 := pg.Script("insert", baselineInsert)
	updates, err2 := pg.Script("update", baselineUpdate)
	beside, err3 := pg.Script("update", baselineUpdate) // the same, sampled beside the unwritten renewals
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	var leases []string
	var acquires, written, unwritten []float64
	// With a staleness threshold of 1 s every renewal has to be written.
	err = b.on(ctx, db, map[string]any{"staleness_threshold_seconds": 1}, func(_ *process, l *load.Load) error {
		if leases, err = b.fill(l); err != nil {
			return err
		}
		for range rounds {
			if err := errors.Join(
				inserts.Sample(ctx), b.newLeases(ctx, &acquires),
				updates.Sample(ctx), renewals(l, leases, &written),
			); err != nil {
				return err
			}
		}
		return b.list(l, r)
	})
	if err != nil {
		return err
	}
	err = b.on(ctx, db, nil, func(_ *process, l *load.Load) error {
		for range rounds {
			if err := errors.Join(renewals(l, leases, &unwritten), beside.Sample(ctx)); err != nil {
				return err
			}
		}
		return nil
	})
	inserts.Compare(r, "lease.acquire", acquires, 1, 0)
	updates.Compare(r, "lease.renew.written", written, 1, 0)
	beside.Compare(r, "lease.renew.unwritten", unwritten, 1, 0)
	return err
}

// newLeases lets hosts without a lease get one. That is measured on a database of its own, of which 10,000 leases and no more are held when it begins: after a few
// rounds on one database all subnets of 10.0.0.0/8 would have been used before.
func (b *run) newLeases(ctx context.Context, samples *[]float64) error {
	db, err := b.server.NewDatabase(ctx)
	if err != nil {
		return err
	}
	return b.on(ctx, db, nil, func(_ *process, l *load.Load) error {
		if _, err := b.fill(l); err != nil {
			return err
		}
		rate, err := l.During(round, func(c *load.Client, _, _ int) error {
			_, err := c.Call("PUT", leasehttp.PathAcquire, acquire(b.host()))
			return err
		})
		*samples = append(*samples, rate)
		return err
	})
}

func renewals(l *load.Load, leases []string, samples *[]float64) error {
	rate, err := l.During(round, func(c *load.Client, who, k int) error {
		_, err := c.Call("PUT", leasehttp.PathRenew, leases[(who+k*clients)%len(leases)])
		return err
	})
	*samples = append(*samples, rate)
	return err
}

// list measures the whole list, body read, over one kept connection.
func (b *run) list(l *load.Load, r *bench.Report) error {
	var took []float64
	var size int
	for range fetches {
		ms, err := bench.Millis(func() error {
			body, err := l.Clients[0].Call("GET", leasehttp.PathLeases, "")
			size = len(body)
			return err
		})
		if err != nil {
			return err
		}
		took = append(took, ms)
	}
	r.AtMost("lease.list.p50", bench.Median(took), "ms", 5)
	r.Add("lease.list.p99", bench.Percentile(took, 0.99), "ms", math.NaN())
	r.Add("lease.list.size", float64(size)/1024, "KiB", math.NaN())
	return nil
}

// memory measures what waiting daemons cost a controller that has just started: all of them connected and waiting, then all
// woken by a change and waiting again.
func (b *run) memory(ctx context.Context, r *bench.Report) error {
	db, err := b.server.NewDatabase(ctx)
	if err != nil {
		return err
	}
	if err := b.on(ctx, db, nil, func(_ *process, l *load.Load) error { _, err := b.fill(l); return err }); err != nil {
		return err
	}
	return b.on(ctx, db, nil, func(p *process, l *load.Load) error {
		since, err := revision(l.Clients[0])
		if err != nil {
			return err
		}
		idle, err := p.RSS()
		if err != nil {
			return err
		}
		watch := func(c *load.Client) error { return c.Send("GET", leasehttp.PathWatch+"?wait=60&since="+since, "") }
		daemons, err := load.DialAll(ctx, p.API, b.tls, waiting, watch)
		if err != nil {
			return err
		}
		defer daemons.Close()
		first, err := waitingRSS(ctx, p)
		if err != nil {
			return err
		}
		start := time.Now()
		if _, err := l.Clients[0].Call("PUT", leasehttp.PathAcquire, acquire(b.host())); err != nil {
			return err
		}
		for _, c := range daemons.Clients {
			if _, _, err := c.Receive(); err != nil {
				return err
			}
		}
		told := time.Since(start)
		if since, err = revision(l.Clients[0]); err != nil {
			return err
		}
		for _, c := range daemons.Clients {
			if err := watch(c); err != nil {
				return err
			}
		}
		again, err := waitingRSS(ctx, p)
		r.AtMost("lease.wait.memory", (first-idle)/waiting, "KiB", 64)
		r.AtMost("lease.wait.memory.after", (again-idle)/waiting, "KiB", 64)
		r.Add("lease.wait.idle", idle/1024, "MiB", math.NaN())
		r.Add("lease.wait.told", float64(told)/1e6, "ms", math.NaN())
		return err
	})
}

// waitingRSS returns the resident memory of the controller, in KiB, when all daemons wait.
func waitingRSS(ctx context.Context, p *process) (float64, error) {
	if err := p.awaitWatchers(ctx, waiting); err != nil {
		return 0, err
	}
	return p.RSS()
}

func revision(c *load.Client) (string, error) {
	body, err := c.Call("GET", leasehttp.PathWatch, "")
	if err != nil {
		return "", err
	}
	var u struct{ Revision string }
	if err := json.Unmarshal(body, &u); err != nil || u.Revision == "" {
		return "", fmt.Errorf("watch answered %.100q: %w", body, err)
	}
	return u.Revision, nil
}
