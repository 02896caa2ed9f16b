package httpjson

import (
	"net/http"
	"net/netip"

	"code.cloudfoundry.org/silk/fault"
)

// SpeaksFor reports, as fault.Denied, a request about a host that the client's certificate does not speak for: the host's address is no IP SAN of it.
func SpeaksFor(r *http.Request, host netip.Addr) error {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return fault.Deniedf("there is no client certificate that could speak for %v", host)
	}
	c := r.TLS.PeerCertificates[0]
	for _, ip := range c.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); ok && a.Unmap() == host {
			return nil
		}
	}
	return fault.Deniedf("the client certificate of %q speaks for the addresses %v, not for %v: issue one with that address as IP SAN",
		c.Subject.CommonName, c.IPAddresses, host)
}
