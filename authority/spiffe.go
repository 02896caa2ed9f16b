package authority

import (
	"net/netip"
	"net/url"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/registration"
)

// TrustDomain is the part of SPIFFE ids that says whose they are: a domain name in lower case that no name server needs to know. The zero TrustDomain is none.
type TrustDomain string

// ParseTrustDomain reads a trust domain in any case. What is no domain name, or an IP address, is fault.Invalid.
func ParseTrustDomain(s string) (TrustDomain, error) {
	n, err := registration.ParseName(s)
	if _, isAddr := netip.ParseAddr(strings.TrimSuffix(s, ".")); err != nil || isAddr == nil || s[0] == '*' || strings.HasSuffix(s, ".") {
		return "", fault.Invalidf("trust domain %.80q: expected a name such as silk.internal", s)
	}
	return TrustDomain(n), nil
}

const groupPath = "/group/"

// escapeGroup spells a group as one segment of a path. Segments of dots, which programs that tidy paths would remove, are spelled otherwise.
func escapeGroup(g identity.Group) string {
	switch g {
	case ".":
		return "%2E"
	case "..":
		return "%2E%2E"
	}
	return url.PathEscape(string(g))
}

// ID returns the SPIFFE id of a group: spiffe://TRUSTDOMAIN/group/GROUP with GROUP percent-encoded.
func (t TrustDomain) ID(g identity.Group) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: string(t), Path: groupPath + string(g), RawPath: groupPath + escapeGroup(g)}
}

// Group returns the group that a SPIFFE id of the trust domain names. Another trust domain is fault.Denied, what ID does not write fault.Invalid: of each
// group there is one spelling.
func (t TrustDomain) Group(id *url.URL) (identity.Group, error) {
	if id.Scheme != "spiffe" || id.Opaque != "" || id.User != nil || id.RawQuery != "" || id.ForceQuery || id.Fragment != "" || id.RawFragment != "" {
		return "", fault.Invalidf("%.300q is no SPIFFE id: expected %v", id.String(), t.ID("GROUP"))
	}
	if t == "" || id.Host != string(t) {
		return "", fault.Deniedf("%.300q is of another trust domain than %q", id.String(), string(t))
	}
	escaped, ok := strings.CutPrefix(id.EscapedPath(), groupPath)
	text, err := url.PathUnescape(escaped)
	g := identity.Group(text)
	if !ok || err != nil || escapeGroup(g) != escaped {
		return "", fault.Invalidf("%.300q names no group: expected %v", id.String(), t.ID("GROUP"))
	}
	return g, g.Validate()
}
