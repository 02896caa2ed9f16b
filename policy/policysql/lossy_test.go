package policysql_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
)

// lossy stands between a store and its server and now and then ends a connection instead of passing an answer on: what the server did then, a commit for
// one, is done. It begins with that once armed is set.
func lossy(t *testing.T, cfg sqldb.Config, seed uint64, armed *atomic.Bool) sqldb.Config {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	network, to := "tcp", net.JoinHostPort(cfg.Host, strconv.Itoa(int(cfg.Port)))
	if strings.HasPrefix(cfg.Host, "/") {
		if network, to = "unix", cfg.Host; cfg.Type == sqldb.Postgres {
			to = filepath.Join(cfg.Host, fmt.Sprintf(".s.PGSQL.%d", max(cfg.Port, 5432)))
		}
	}
	rnd, mu := rand.New(rand.NewPCG(seed, 1)), new(sync.Mutex)
	cut := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return armed.Load() && rnd.IntN(25) == 0
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				s, err := net.Dial(network, to)
				if err != nil {
					return
				}
				defer s.Close()
				go func() { pass(s, c, func() bool { return false }) }()
				pass(c, s, cut)
			}()
		}
	}()
	a := ln.Addr().(*net.TCPAddr)
	cfg.Host, cfg.Port = a.IP.String(), uint16(a.Port)
	return cfg
}

// pass copies what comes until the connection ends or lose says so, then closes both.
func pass(to, from net.Conn, lose func() bool) {
	defer to.Close()
	defer from.Close()
	for b := make([]byte, 64<<10); ; {
		n, err := from.Read(b)
		if err != nil || lose() {
			return
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

// TestLostAnswers has clients write at stores whose connections end at any moment, commits included, and others watch: an acknowledged change holds, one
// that failed holds whole or not at all, a quota is kept, no tag is given twice, and who watches has in the end just what there is.
func TestLostAnswers(t *testing.T) {
	for _, engine := range []string{sqldb.Postgres, sqldb.MySQL} {
		t.Run(engine, func(t *testing.T) {
			db := testkit.Database(t, engine)
			var armed atomic.Bool
			var stores []*policysql.Store
			for n := range 3 {
				stores = append(stores, open(t, config(lossy(t, db, uint64(n), &armed))))
			}
			armed.Store(true)
			truth := open(t, config(db))
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var watchers, writers sync.WaitGroup
			seen := make([]*watcher, 9)
			for n := range seen {
				seen[n] = &watcher{store: stores[n%3], groups: []identity.Group{identity.Group(fmt.Sprintf("d%d", n%4)), identity.Group(fmt.Sprintf("s%d", n%6))}}
				watchers.Go(func() { seen[n].follow(ctx, t) })
			}
			sure := make([]map[policy.Policy]bool, 6) // whether it is there, of those of which that is known
			for n := range sure {
				sure[n] = map[policy.Policy]bool{}
				writers.Go(func() { scribble(t, stores, n, sure[n]) })
			}
			writers.Wait()
			remove(t, truth, policytest.Of(t, "nobody nothing tcp 1")) // which asks the database, while reads may be a second old
			want := rules(t, truth)
			have := map[policy.Policy]bool{}
			scarce := 0
			for _, r := range want {
				have[r.Policy] = true
				if strings.HasPrefix(string(r.Source), "scarce") {
					scarce++
				}
			}
			for n, known := range sure {
				for p, there := range known {
					if have[p] != there {
						t.Errorf("writer %d: %v is there: %v, want %v as was acknowledged", n, p, have[p], there)
					}
				}
			}
			if scarce > 8 {
				t.Errorf("%d policies of a source with a quota of 8", scarce)
			}
			owners := map[identity.Tag]identity.Group{}
			for _, g := range tags(t, truth) {
				if was, ok := owners[g.Tag]; ok {
					t.Errorf("tag %v is of %s and %s", g.Tag, was, g.Group)
				}
				owners[g.Tag] = g.Group
			}
			for n, w := range seen {
				var touching []policy.Rule
				for _, r := range want {
					if r.Touches(w.groups[0]) || r.Touches(w.groups[1]) {
						touching = append(touching, r)
					}
				}
				policytest.Eventually(t, fmt.Sprintf("watcher %d has what there is", n), func() bool { return slices.Equal(w.rules(), touching) })
			}
			stop()
			watchers.Wait()
		})
	}
}

// scribble makes and ends policies at stores, and notes of which it knows whether they are there. What became of a change without an answer may show late: nothing
// is known of that policy any more.
func scribble(t *testing.T, stores []*policysql.Store, who int, known map[policy.Policy]bool) {
	rnd, doubtful := rand.New(rand.NewPCG(uint64(who), 7)), map[policy.Policy]bool{}
	for n := range 60 {
		s := stores[rnd.IntN(len(stores))]
		p := policytest.Of(t, fmt.Sprintf("s%d d%d tcp %d", who, rnd.IntN(4), 1+rnd.IntN(5)))
		there := rnd.IntN(2) == 0
		var err error
		if there {
			_, err = s.CreateWithin(t.Context(), []policy.Policy{p}, 0)
		} else {
			_, err = s.Remove(t.Context(), []policy.Policy{p})
		}
		doubtful[p] = doubtful[p] || err != nil
		if known[p] = there; doubtful[p] {
			delete(known, p)
		}
		if err != nil && !errors.Is(err, fault.Unavailable) {
			t.Errorf("writer %d: %v", who, err)
		}
		if n%6 == 0 {
			p := policytest.Of(t, fmt.Sprintf("scarce d%d tcp %d", who%4, 1+rnd.IntN(60000)))
			if _, err := s.CreateWithin(t.Context(), []policy.Policy{p}, 8); err != nil && !errors.Is(err, fault.Unavailable) && !errors.Is(err, policysql.ErrQuota) {
				t.Errorf("writer %d: %v", who, err)
			}
		}
	}
}

// watcher follows a store as an agent does.
type watcher struct {
	store  *policysql.Store
	groups []identity.Group

	mu   sync.Mutex
	held []policy.Rule
}

func (w *watcher) rules() []policy.Rule {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.held
}

func (w *watcher) follow(ctx context.Context, t *testing.T) {
	a := policy.Ask{Host: fmt.Sprint(w.groups), Groups: w.groups}
	pause := time.NewTicker(20 * time.Millisecond)
	defer pause.Stop()
	for ctx.Err() == nil {
		u, err := w.store.WatchFor(ctx, a, time.Second)
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, fault.Unavailable) {
				t.Error(err)
			}
			<-pause.C
			continue
		}
		w.mu.Lock()
		next, err := u.Apply(w.held)
		if err != nil {
			t.Errorf("watcher of %v, since %v: %v", w.groups, a.Since, err)
			a.Since = policy.Ask{}.Since
		} else {
			w.held, a.Since, a.InForce = next, u.Revision, u.Revision
		}
		w.mu.Unlock()
	}
}
