package policysql

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
)

// next says which tag is to be given, by looking at all of them.
func next(p *pool, now int64) (best freedTag, ok bool) {
	for t := 1; t <= int(p.highest); t++ {
		c := freedTag{p.state[t], identity.Tag(t)}
		switch {
		case c.at == used || c.at > never && now < c.at+p.quarantine:
		case !ok || cmp.Less(c.at, best.at):
			best, ok = c, true
		}
	}
	return best, ok
}

// TestPoolAgreesWithASearch frees, takes and gives back tags at random.
func TestPoolAgreesWithASearch(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	p := newPool(40, 50*time.Microsecond)
	now := int64(1000)
	exhausted := 0
	for range 20000 {
		now += int64(rnd.IntN(4))
		switch rnd.IntN(3) {
		case 0: // free one
			if tag := identity.Tag(1 + rnd.IntN(40)); p.state[tag] == used {
				p.set(tag, now)
			}
		case 1:
			n := 1 + rnd.IntN(3)
			before := slices.Clone(p.state[:41])
			var want []freedTag
			for range n {
				if best, ok := next(p, now); ok {
					want = append(want, best)
					p.state[best.tag] = used
				}
			}
			copy(p.state, before)
			got, ok := p.take(n, now)
			if ok != (len(want) == n) || ok && !slices.Equal(got, want) {
				t.Fatalf("take(%d) = %v, %v, want %v", n, got, ok, want)
			}
			if !ok {
				exhausted++
			}
			if !ok || rnd.IntN(3) == 0 {
				p.untake(got)
				if !slices.Equal(p.state[:41], before) {
					t.Fatal("what was given back is not what it was")
				}
			}
		default:
			inUse, held := p.figures(now)
			wantUse, wantHeld := 0, 0
			for _, at := range p.state[1:41] {
				if at == used {
					wantUse++
				} else if at > never && now < at+p.quarantine {
					wantHeld++
				}
			}
			if inUse != wantUse || held != wantHeld {
				t.Fatalf("figures are %d, %d, want %d, %d", inUse, held, wantUse, wantHeld)
			}
		}
	}
	if exhausted == 0 || exhausted > 5000 {
		t.Errorf("exhausted %d times: the test tested little", exhausted)
	}
}

// TestPoolLeavesHigherTagsAlone has tags in use that were given when more were allowed.
func TestPoolLeavesHigherTagsAlone(t *testing.T) {
	p := newPool(2, 0)
	p.set(7, used)
	p.set(9, 5)
	if got, ok := p.take(3, 100); ok {
		t.Errorf("took %v of two", got)
	}
	if got, ok := p.take(2, 100); !ok || got[0].tag != 1 || got[1].tag != 2 {
		t.Errorf("took %v, want 1 and 2", got)
	}
	if inUse, held := p.figures(100); inUse != 2 || held != 0 {
		t.Errorf("figures are %d, %d, want 2 and 0", inUse, held)
	}
}
