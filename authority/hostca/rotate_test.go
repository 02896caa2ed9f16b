package hostca_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestRotationWithoutRestart: hosts that ask at different times, two controllers and a root that is replaced under them.
func TestRotationWithoutRestart(t *testing.T) {
	f := newFleet(t)
	oldCert, oldKey := newRoot(t, "old")
	nextCert, nextKey := newRoot(t, "new")
	f.root = parseRoot(t, oldKey, oldCert)
	c1, c2 := f.controller(t, ""), f.controller(t, "")
	d1, d2 := t.TempDir(), t.TempDir()
	once := func(url, dir string) *authority.Leaf { // a host that looks anew: a restart asks for roots at once
		i, stop := start(t, f.config(t, url, dir))
		defer stop()
		l := leaf(t, i, spec)
		testkit.Until(t, 20*time.Second, "other roots", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return i.Roots().Equal(f.root.Bundle())
		})
		return l
	}
	l1, l2 := once(c1.URL, d1), once(c2.URL, d2)
	verify(t, l1, rootsOf(t, d2))
	verify(t, l2, rootsOf(t, d1))

	f.set(func() { f.root = parseRoot(t, oldKey, oldCert, nextCert) }) // both are trusted
	once(c1.URL, d1)
	once(c2.URL, d2)

	f.set(func() { f.root = parseRoot(t, nextKey, nextCert, oldCert) }) // the new one issues
	if err := os.Remove(filepath.Join(d1, "intermediate.json")); err != nil {
		t.Fatal(err)
	}
	l1, l2 = once(c1.URL, d1), once(c2.URL, d2)
	if l1.Chain()[1].Issuer.CommonName != "new" || l2.Chain()[1].Issuer.CommonName != "old" {
		t.Errorf("issuers %v and %v", l1.Chain()[1].Issuer, l2.Chain()[1].Issuer)
	}
	verify(t, l1, rootsOf(t, d2))
	verify(t, l2, rootsOf(t, d1))

	f.set(func() { f.root = parseRoot(t, nextKey, nextCert) }) // the old one goes: who has it asks at once
	i, _ := start(t, f.config(t, c2.URL, d2))
	testkit.Within(t, 20*time.Second, func() string {
		l, err := i.Leaf(t.Context(), spec)
		if err != nil {
			return err.Error()
		}
		return strings.TrimPrefix(l.Chain()[1].Issuer.CommonName, "new")
	})
	verify(t, leaf(t, i, spec), rootsOf(t, d2))
}

// TestADomainThatIsAddedArrives: a name that is left out makes a host whose intermediate is old ask.
func TestADomainThatIsAddedArrives(t *testing.T) {
	f := newFleet(t)
	dir := t.TempDir()
	i, stop := start(t, f.config(t, f.controller(t, "").URL, dir))
	leaf(t, i, spec)
	stop()
	f.domains = append(f.domains, "other.internal")
	i, _ = start(t, f.config(t, f.controller(t, "").URL, dir))
	s := spec
	s.Names = []string{"x.other.internal"}
	if l := leaf(t, i, s); !slices.Equal(l.LeftOut, s.Names) {
		t.Errorf("left out %q", l.LeftOut)
	}
	testkit.Until(t, 20*time.Second, "the name is still left out", func() bool { return len(leaf(t, i, s).LeftOut) == 0 })
}
