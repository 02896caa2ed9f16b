package authority

import (
	"crypto/x509"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
)

// Verify reports, as fault.Denied, a chain as the other end of a connection shows it, its own certificate first, that does not lead to one of
// the roots, is not valid now, is not for usage, or breaks a constraint of one of its authorities.
func Verify(chain []*x509.Certificate, roots Bundle, usage x509.ExtKeyUsage, now time.Time) error {
	switch {
	case len(chain) == 0:
		return fault.Deniedf("there is no certificate")
	case roots.IsZero():
		return fault.Deniedf("there is no root that could vouch for %v", chain[0].Subject)
	case chain[0].IsCA:
		return fault.Deniedf("%v is an authority and nobody's certificate", chain[0].Subject)
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{Roots: roots.pool, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
	return fault.New(fault.Denied, err)
}

// Peer is who a certificate says that its owner is. It is worth what Verify says of the certificate.
type Peer struct {
	Addresses []netip.Addr
	Names     []string
	Group     identity.Group
}

// diegoApp begins the organizational unit by which Diego names an application's instances.
const diegoApp = "app:"

// PeerOf reads a certificate. The group is that of its SPIFFE id in the trust domain t or, where there is none or t is "", that of the organizational unit
// app:GUID (Diego's instance identity). A certificate with several groups, or none, is fault.Denied.
func PeerOf(c *x509.Certificate, t TrustDomain) (Peer, error) {
	p := Peer{Names: c.DNSNames}
	for _, ip := range c.IPAddresses {
		// An IPv4 address that is spelled as an IPv6 one is not what name constraints permit: it is nobody's.
		if a, ok := netip.AddrFromSlice(ip); ok && !a.Is4In6() {
			p.Addresses = append(p.Addresses, a)
		}
	}
	var err error
	if t != "" && slices.ContainsFunc(c.URIs, isSPIFFE) {
		if len(c.URIs) != 1 { // SPIFFE X.509-SVID section 2
			return Peer{}, fault.Deniedf("the certificate of %v has %d URIs: expected one", c.Subject, len(c.URIs))
		}
		p.Group, err = t.Group(c.URIs[0])
	} else {
		p.Group, err = diegoGroup(c)
	}
	if err != nil {
		return Peer{}, fault.New(fault.Denied, err)
	}
	return p, nil
}

func isSPIFFE(u *url.URL) bool { return u.Scheme == "spiffe" }

func diegoGroup(c *x509.Certificate) (identity.Group, error) {
	var found []identity.Group
	for _, u := range c.Subject.OrganizationalUnit {
		if guid, ok := strings.CutPrefix(u, diegoApp); ok {
			found = append(found, identity.Group(guid))
		}
	}
	if len(found) != 1 {
		return "", fault.Deniedf("the certificate of %v names %d groups: expected one, as SPIFFE id or as organizational unit app:GUID", c.Subject, len(found))
	}
	return found[0], found[0].Validate()
}

// Is reports, as fault.Denied, that the peer may not speak from an address or for a group.
func (p Peer) Is(from netip.Addr, group identity.Group) error {
	switch {
	case !slices.Contains(p.Addresses, from.Unmap()):
		return fault.Deniedf("the certificate is for the addresses %v, the connection comes from %v", p.Addresses, from)
	case group == "" || p.Group != group:
		return fault.Deniedf("the certificate is of the group %q, the connection comes from %q", string(p.Group), string(group))
	}
	return nil
}
