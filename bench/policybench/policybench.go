// Package policybench measures policy-server: a process of its own over PostgreSQL with durable commits and 62,000 policies between
// 20,000 applications, asked over TLS, and a fleet of 2,000 agents that watch it.
//
// New policies are compared with what pgbench commits on the same server as single-row transactions of the same kind, by its own defaults and with prepared
// statements, in rounds that alternate. The agents
// are real clients of the watch (policyhttp.Client) without a kernel; they and the server are in a network namespace of their own, whose loopback device
// counts their traffic.
//
// Use: policybench.Run(ctx, report), or make bench ONLY=policy.
package policybench

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/bench/load"
	"code.cloudfoundry.org/silk/bench/server"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

const (
	held    = 62000 // policies
	apps    = 20000
	clients = 8
	rounds  = 3
	round   = 5 * time.Second
	queries = 300
	lists   = 30
	token   = "bench"
)

// Run measures and fills r. It needs the server programs of PostgreSQL, the go command, and to be root.
func Run(ctx context.Context, r *bench.Report) error {
	dir, err := os.MkdirTemp("", "silk-policybench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b, err := prepare(ctx, dir)
	if err != nil {
		return err
	}
	defer b.server.Stop()
	return errors.Join(b.central(ctx, r), b.fleet(ctx, r))
}

// setup is what a policy-server of the benchmark is started with.
type setup struct {
	Dir, Bin         string
	CA, Cert, Key    string
	Database, Tokens string // the first as JSON
}

type run struct {
	setup
	server *testkit.Server
}

func prepare(ctx context.Context, dir string) (*run, error) {
	b := &run{setup: setup{Dir: dir}}
	var err error
	if b.Bin, err = server.Build(ctx, dir, "policy-server"); err != nil {
		return nil, err
	}
	ca, err := pki.OpenCA(filepath.Join(dir, "pki"))
	if err != nil {
		return nil, err
	}
	b.CA = ca.CertFile()
	if b.Cert, b.Key, err = ca.Issue("localhost", netip.MustParseAddr("127.0.0.1")); err != nil {
		return nil, err
	}
	h := sha256.Sum256([]byte(token))
	b.Tokens = filepath.Join(dir, "tokens.json")
	if err := os.WriteFile(b.Tokens, []byte(`{"tokens":[{"name":"bench","sha256":"`+hex.EncodeToString(h[:])+`","admin":true}]}`), 0o600); err != nil {
		return nil, err
	}
	b.server, err = testkit.StartPostgres(ctx, testkit.Options{Durable: true})
	return b, err
}

// newDatabase makes the next servers use another empty database.
func (b *run) newDatabase(ctx context.Context) error {
	db, err := b.server.NewDatabase(ctx)
	if err != nil {
		return err
	}
	text, err := json.Marshal(db)
	b.Database = string(text)
	return err
}

// app returns the group of an application: of the form and length of a GUID.
func app(n int) identity.Group {
	return identity.Group(fmt.Sprintf("%08x-e53a-42a2-b5ca-%012x", n*2654435761&0xffffffff, n))
}

// policies returns n policies between the applications, the same each time. Each application is the source of about three.
func policies(n int) []policy.Policy {
	rnd := rand.New(rand.NewPCG(1, 2))
	ps := make([]policy.Policy, n)
	for i := range ps {
		ps[i] = policy.Policy{Source: app(i % apps), Destination: app(rnd.IntN(apps)), Protocol: policy.TCP, Ports: policy.Ports{First: uint16(1 + i/apps), Last: uint16(1 + i/apps)}}
	}
	return ps
}

// person returns a client of the external API.
func (s *setup) person(p *process) (*policyhttp.Client, error) {
	tc, err := service.Certificates{CA: s.CA, Cert: s.Cert, Key: s.Key}.Client()
	if err != nil {
		return nil, err
	}
	return policyhttp.NewClient([]string{"https://" + p.External}, tc, policyhttp.ClientOptions{
		Timeout: time.Minute, Token: func(context.Context) (string, error) { return token, nil },
	}), nil
}

// fill creates the policies, 2,000 in a request.
func fill(ctx context.Context, c *policyhttp.Client, ps []policy.Policy) error {
	for len(ps) > 0 {
		n := min(2000, len(ps))
		if err := c.Create(ctx, ps[:n]); err != nil {
			return err
		}
		ps = ps[n:]
	}
	return nil
}

// central measures what one server does for people and for agents that poll.
func (b *run) central(ctx context.Context, r *bench.Report) (err error) {
	if err := b.newDatabase(ctx); err != nil {
		return err
	}
	pg := server.NewBaseline(b.server, b.Dir, baselineTable, baselineRows, held, clients, round)
	inserts, err := pg.Script("insert", baselineInsert)
	if err != nil {
		return err
	}
	first, err := b.start(ctx)
	if err != nil {
		return err
	}
	c, err := b.person(first)
	if err == nil {
		start := time.Now()
		err = fill(ctx, c, policies(held))
		r.Add("policy.fill", held/time.Since(start).Seconds(), "policies/s", math.NaN())
		c.Close()
	}
	if err = errors.Join(err, first.Stop()); err != nil {
		return err
	}
	p, err := b.start(ctx) // as after a restart: the memory of filling is gone
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()
	return errors.Join(b.reads(ctx, r, p), b.memory(r, p), b.writes(ctx, r, p, inserts))
}

func (b *run) memory(r *bench.Report, p *process) error {
	rss, err := p.resident()
	r.AtMost("policy.resident", rss, "MiB", 64)
	return err
}

// get fetches from the internal API and returns how long that took, body read, and its size.
func get(ctx context.Context, h *http.Client, url string) (float64, int64, error) {
	var n int64
	ms, err := bench.Millis(func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
		if err != nil {
			return err
		}
		resp, err := h.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", url[:min(len(url), 100)], resp.Status)
		}
		n, err = io.Copy(io.Discard, resp.Body)
		return err
	})
	return ms, n, err
}

// reads measures the query for 100 ids and the whole list, over one kept connection.
func (b *run) reads(ctx context.Context, r *bench.Report, p *process) error {
	tc, err := service.Certificates{CA: b.CA, Cert: b.Cert, Key: b.Key}.Client()
	if err != nil {
		return err
	}
	h := &http.Client{Transport: &http.Transport{TLSClientConfig: tc, DisableCompression: true}}
	defer h.CloseIdleConnections()
	rnd := rand.New(rand.NewPCG(3, 4))
	var some, all []float64
	var someSize, allSize int64
	for range queries {
		ids := make([]string, 100)
		for i := range ids {
			ids[i] = string(app(rnd.IntN(apps)))
		}
		ms, n, err := get(ctx, h, "https://"+p.Internal+policyhttp.PathPolicies+"?id="+strings.Join(ids, ","))
		if err != nil {
			return err
		}
		some, someSize = append(some, ms), n
	}
	for range lists {
		ms, n, err := get(ctx, h, "https://"+p.Internal+policyhttp.PathPolicies)
		if err != nil {
			return err
		}
		all, allSize = append(all, ms), n
	}
	r.AtMost("policy.query100.p50", bench.Median(some), "ms", 3)
	r.Add("policy.query100.p99", bench.Percentile(some, 0.99), "ms", math.NaN())
	r.Add("policy.query100.size", float64(someSize)/1024, "KiB", math.NaN())
	r.AtMost("policy.list.p50", bench.Median(all), "ms", 60)
	r.Add("policy.list.size", float64(allSize)/(1<<20), "MiB", math.NaN())
	return nil
}

// writes measures policies that are created one in a request, in rounds that alternate with pgbench, and removes them again.
func (b *run) writes(ctx context.Context, r *bench.Report, p *process, inserts *server.Script) error {
	c, err := b.person(p)
	if err != nil {
		return err
	}
	defer c.Close()
	tc, err := service.Certificates{CA: b.CA, Cert: b.Cert, Key: b.Key}.Client()
	if err != nil {
		return err
	}
	l, err := load.DialAll(ctx, p.External, tc, clients, func(c *load.Client) error {
		c.Header("Authorization: bearer " + token + "\r\n")
		return nil
	})
	if err != nil {
		return err
	}
	defer l.Close()
	var creates []float64
	for n := range rounds {
		made := make([][]policy.Policy, clients)
		rate, err := l.During(round, func(c *load.Client, who, k int) error {
			q := policy.Policy{
				Source: app((who*2503 + k) % apps), Destination: app((who*7919 + k*31) % apps), Protocol: policy.UDP, Ports: policy.Ports{First: uint16(n + 1), Last: uint16(1000 + k%60000)},
			}
			made[who] = append(made[who], q)
			_, err := c.Call(http.MethodPost, policyhttp.ExternalV1+"/policies", body(q))
			return err
		})
		creates = append(creates, rate)
		if err = errors.Join(err, inserts.Sample(ctx)); err != nil {
			return err
		}
		for part := range slices.Chunk(slices.Concat(made...), 2000) {
			if err := c.Delete(ctx, part); err != nil {
				return err
			}
		}
	}
	inserts.Compare(r, "policy.create", creates, 0.5, 0)
	return nil
}

// body is the request to create one policy.
func body(p policy.Policy) string {
	return fmt.Sprintf(`{"policies":[{"source":{"id":"%s"},"destination":{"id":"%s","protocol":"%v","ports":{"start":%d,"end":%d}}}]}`,
		p.Source, p.Destination, p.Protocol, p.Ports.First, p.Ports.Last)
}
