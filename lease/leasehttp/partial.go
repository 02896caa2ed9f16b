package leasehttp

import (
	"fmt"
	"net/netip"
	"strings"

	"code.cloudfoundry.org/silk/lease"
)

// Partial is the error that Client.Leases and Client.Watch return beside leases when the server sent some that cannot be
// used. The leases given are good and may be adopted. The list is not complete: a lease for which May is true must not be
// removed because it is missing.
type Partial struct{ Skipped []Skipped }

// Skipped is one lease that was left out: why, and what of it could be read.
type Skipped struct {
	Err      error
	Underlay netip.Addr   // invalid: could not be read
	Subnet   netip.Prefix // invalid: could not be read; masked
}

func skip(w wireLease, err error) Skipped {
	s := Skipped{Err: err}
	if a, err := parseUnderlay(w.Underlay); err == nil {
		s.Underlay = a
	}
	if p, err := netip.ParsePrefix(w.Subnet); err == nil {
		s.Subnet = p.Masked()
	}
	return s
}

// May reports whether l could be one of the leases that were left out. A left-out lease of which nothing could be read
// could be any.
func (p *Partial) May(l lease.Lease) bool {
	for _, s := range p.Skipped {
		if (!s.Underlay.IsValid() || s.Underlay == l.Underlay) && (!s.Subnet.IsValid() || s.Subnet == l.Subnet) {
			return true
		}
	}
	return false
}

// Error counts the leases and gives the reasons of the first three.
func (p *Partial) Error() string {
	const shown = 3
	var b strings.Builder
	fmt.Fprintf(&b, "%d leases of the list cannot be used", len(p.Skipped))
	for i, s := range p.Skipped[:min(len(p.Skipped), shown)] {
		fmt.Fprintf(&b, "%s %v", map[bool]string{true: ":", false: ";"}[i == 0], s.Err)
	}
	if len(p.Skipped) > shown {
		b.WriteString("; ...")
	}
	return b.String()
}
