package authority

import (
	"crypto/x509"
	"net"
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
)

// Constraints are what an intermediate may sign for. Each kind must be there: where there is no constraint of a kind, all names of it are permitted (RFC 5280
// section 4.2.1.10).
type Constraints struct {
	Subnets     []netip.Prefix      // that containers of the host have addresses of; masked
	Domains     []registration.Name // that their names are in or below
	TrustDomain TrustDomain
}

const maxSubnets = 64 // and domains

// Validate reports, as fault.Invalid, constraints that leave a kind of name free or cannot be written.
func (c Constraints) Validate() error {
	switch {
	case len(c.Subnets) == 0 || len(c.Subnets) > maxSubnets:
		return fault.Invalidf("%d subnets: expected 1 to %d", len(c.Subnets), maxSubnets)
	case len(c.Domains) == 0 || len(c.Domains) > maxSubnets:
		return fault.Invalidf("%d domains: expected 1 to %d", len(c.Domains), maxSubnets)
	}
	for _, p := range c.Subnets {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
			return fault.Invalidf("subnet %v: expected a network such as 10.255.30.0/24", p)
		}
	}
	for _, d := range c.Domains {
		if n, err := registration.ParseName(string(d)); err != nil || n != d || d[0] == '*' {
			return fault.Invalidf("domain %.80q: expected a name such as apps.internal", string(d))
		}
	}
	if t, err := ParseTrustDomain(string(c.TrustDomain)); err != nil || t != c.TrustDomain {
		return fault.Invalidf("trust domain %.80q: expected a name such as silk.internal", string(c.TrustDomain))
	}
	return nil
}

// apply writes the constraints into a template.
func (c Constraints) apply(t *x509.Certificate) {
	t.PermittedDNSDomainsCritical = true // the whole extension is
	for _, p := range c.Subnets {
		t.PermittedIPRanges = append(t.PermittedIPRanges, &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())})
	}
	for _, d := range c.Domains {
		t.PermittedDNSDomains = append(t.PermittedDNSDomains, string(d))
	}
	t.PermittedURIDomains = []string{string(c.TrustDomain)}
}

// constraintsOf reads the constraints of an intermediate. Those that Constraints cannot hold, and excluded names, are fault.Invalid.
func constraintsOf(i *x509.Certificate) (Constraints, error) {
	var c Constraints
	for _, n := range i.PermittedIPRanges {
		a, ok := netip.AddrFromSlice(n.IP)
		bits, size := n.Mask.Size()
		if !ok || size != a.BitLen() {
			return c, fault.Invalidf("constraint %v: expected a network", n)
		}
		c.Subnets = append(c.Subnets, netip.PrefixFrom(a, bits))
	}
	for _, d := range i.PermittedDNSDomains {
		c.Domains = append(c.Domains, registration.Name(d))
	}
	if len(i.PermittedURIDomains) != 1 || len(i.ExcludedDNSDomains)+len(i.ExcludedIPRanges)+len(i.ExcludedURIDomains) > 0 {
		return c, fault.Invalidf("constraints of %v: expected one trust domain and nothing excluded", i.Subject)
	}
	c.TrustDomain = TrustDomain(i.PermittedURIDomains[0])
	return c, c.Validate()
}

// covers reports whether an address is permitted.
func (c Constraints) covers(a netip.Addr) bool {
	return a.Zone() == "" && slices.ContainsFunc(c.Subnets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// permits reports whether a name is permitted; a wildcard is if the name behind it is, and no domain itself: a certificate for that would be for all
// names of the domain's containers, and is had by one registration.
func (c Constraints) permits(n registration.Name) bool {
	behind, wildcard := strings.CutPrefix(string(n), "*.")
	if wildcard && slices.Contains(c.Domains, registration.Name(behind)) {
		return false
	}
	return slices.ContainsFunc(c.Domains, registration.Name(behind).Below)
}
