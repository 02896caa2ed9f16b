package authority_test

import (
	"crypto/x509"
	"net/netip"
	"testing"

	"code.cloudfoundry.org/silk/authority"
)

// BenchmarkIntermediate is what a controller does for a request: its signature checked, an intermediate signed.
func BenchmarkIntermediate(b *testing.B) {
	r := newRoot(b, "root")
	text, err := authority.NewRequest(newKey(b))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		q, err := authority.ParseRequest(text)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := r.Intermediate(hostAddr, q, constraints(), authority.MaxIntermediate, now); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLeaf(b *testing.B) {
	i := intermediate(b, newRoot(b, "root"), constraints())
	for b.Loop() {
		if _, err := i.Leaf(authority.Spec{Names: []string{"api.apps.internal", "0.api.apps.internal"}, Addresses: []netip.Addr{inside}, Group: "g"}, now); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	r := newRoot(b, "root")
	l, err := intermediate(b, r, constraints()).Leaf(authority.Spec{Names: []string{"api.apps.internal"}, Addresses: []netip.Addr{inside}, Group: "g"}, now)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := authority.Verify(l.Chain(), r.Bundle(), x509.ExtKeyUsageClientAuth, now); err != nil {
			b.Fatal(err)
		}
	}
}
