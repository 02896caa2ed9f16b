package hostca

import (
	"crypto/x509"
	"encoding/json"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/internal/durable"
	"code.cloudfoundry.org/silk/registration"
)

// TestTimeFor has a row for each clock that a host may have.
func TestTimeFor(t *testing.T) {
	begin := time.Now()
	day := 24 * time.Hour
	c := &x509.Certificate{NotBefore: begin, NotAfter: begin.Add(6 * day), SerialNumber: big.NewInt(1 << 8)}
	early := &x509.Certificate{NotBefore: begin, NotAfter: begin.Add(6 * day), SerialNumber: big.NewInt(255)}
	for name, x := range map[string]struct {
		cert     *x509.Certificate
		fresh    bool
		got, now time.Time
		want     bool
	}{
		"just given":                        {c, true, begin, begin.Add(time.Minute), false},
		"a day old":                         {c, true, begin, begin.Add(day), false},
		"half of its life":                  {c, true, begin, begin.Add(3 * day), true},
		"a little before":                   {c, true, begin, begin.Add(3*day - 2*time.Hour), false},
		"a little before, by its serial":    {early, true, begin, begin.Add(3*day - 2*time.Hour), true},
		"not much before":                   {early, true, begin, begin.Add(3*day - 8*time.Hour), false},
		"given, with a clock far ahead":     {c, true, begin.Add(100 * day), begin.Add(100*day + time.Minute), false},
		"an hour later":                     {c, true, begin.Add(100 * day), begin.Add(100*day + time.Hour), true},
		"saved, clock behind":               {c, false, begin.Add(-2 * day), begin.Add(-2 * day), true},
		"given, clock behind":               {c, true, begin.Add(-2 * day), begin.Add(-2*day + time.Hour), false},
		"given, clock behind, half is over": {c, true, begin.Add(-10 * day), begin.Add(-7 * day), true},
		"saved, well":                       {c, false, begin.Add(day), begin.Add(day + time.Minute), false},
		"saved, expired":                    {c, false, begin.Add(7 * day), begin.Add(7 * day), true},
	} {
		if got := timeFor(x.cert, x.fresh, x.got, x.now); got != x.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// given returns an intermediate that was given at some time, and what signed it.
func given(t testing.TB, now time.Time) saved {
	t.Helper()
	cert, key, err := authority.NewRoot("root", 365*24*time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	root, err := authority.ParseRoot(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	k, err := authority.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	csr, err := authority.NewRequest(k)
	if err != nil {
		t.Fatal(err)
	}
	q, err := authority.ParseRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	host := netip.MustParseAddr("10.0.16.5")
	c, err := root.Intermediate(host, q, authority.Constraints{
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.255.30.0/24")}, Domains: []registration.Name{"apps.internal"}, TrustDomain: "silk.internal",
	}, authority.MaxIntermediate, now)
	if err != nil {
		t.Fatal(err)
	}
	i, err := authority.NewIntermediate(c, k)
	if err != nil {
		t.Fatal(err)
	}
	return saved{host, i, root.Bundle()}
}

func TestWhatIsSavedIsRead(t *testing.T) {
	f, err := openFiles(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	want := given(t, time.Now())
	if err := f.store(want); err != nil {
		t.Fatal(err)
	}
	got, err := f.load()
	if err != nil || got.underlay != want.underlay || !got.roots.Equal(want.roots) || !got.intermediate.Certificate().Equal(want.intermediate.Certificate()) {
		t.Errorf("%+v, %v", got, err)
	}
	// What a killed process was writing goes, what stands stays as it is.
	half := filepath.Join(f.dir, durable.Temp+"1")
	if err := os.WriteFile(half, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(f.path(stateFile))
	if err != nil {
		t.Fatal(err)
	}
	if f, err = openFiles(f.dir); err != nil {
		t.Fatal(err)
	}
	if err := f.store(want); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(f.path(stateFile))
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("the same was written again: %v", err)
	}
	if _, err := os.Stat(half); err == nil {
		t.Error("half a file is still there")
	}
}

func FuzzState(f *testing.F) {
	s := given(f, time.Now())
	key, err := authority.EncodeKey(s.intermediate.Key())
	if err != nil {
		f.Fatal(err)
	}
	good, err := json.Marshal(savedJSON{s.underlay, string(key), string(authority.EncodeCertificates([]*x509.Certificate{s.intermediate.Certificate()})), string(s.roots.PEM())})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"underlay_ip":"x"}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decode(b)
		if err != nil {
			return
		}
		if s.intermediate == nil || s.roots.IsZero() {
			t.Fatalf("%+v without an error", s)
		}
		s.intermediate.Leaf(authority.Spec{Addresses: []netip.Addr{s.intermediate.Constraints().Subnets[0].Addr()}, Group: "g"}, time.Now())
	})
}
