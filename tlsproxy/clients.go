package tlsproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

// askTimeout bounds a question to the policy agent.
const askTimeout = 2 * time.Second

// check refuses a client that does not prove to be the peer of its connection: its certificate must be of a trusted authority, for the address
// that it comes from and, when there is a policy agent to ask, of the group by which its packets came in.
func (c *conn) check(ctx context.Context, s tls.ConnectionState, whom trust) error {
	if len(s.PeerCertificates) == 0 {
		return refusalf(badClient, "the client showed no certificate")
	}
	leaf := s.PeerCertificates[0]
	if err := authority.Verify(s.PeerCertificates, whom.roots, x509.ExtKeyUsageClientAuth, time.Now()); err != nil {
		return refusal(badClient, err)
	}
	if !isFor(leaf, c.peer.Addr()) {
		return refusalf(foreignAddress, "the client's certificate is for %v, not for %v", leaf.IPAddresses[:min(len(leaf.IPAddresses), 4)], c.peer.Addr())
	}
	if who := c.port.site.proxy.who; who != nil {
		if err := c.checkGroup(ctx, who, leaf, whom.domain); err != nil {
			return err
		}
	}
	c.checked = true
	return nil
}

// checkGroup refuses a client whose certificate is of another group than its connection.
func (c *conn) checkGroup(ctx context.Context, who asker, leaf *x509.Certificate, domain authority.TrustDomain) error {
	shown, err := authority.PeerOf(leaf, domain)
	if err != nil {
		return refusal(badClient, err)
	}
	<-c.wire.turns // it computes nothing while it asks
	group, err := who(ctx, c.peer, c.local)
	c.wire.turns <- struct{}{}
	switch {
	case errors.Is(err, fault.NotFound):
		return refusalf(unknownGroup, "the policy agent does not know whose connection it is: %w", err)
	case err != nil:
		return refusalf(unknownGroup, "ask the policy agent whose connection it is: %w", err)
	case group == "" || group != shown.Group:
		return refusalf(foreignGroup, "the client's certificate is of group %.80q, its connection of %.80q", string(shown.Group), string(group))
	}
	return nil
}

// isFor reports whether a certificate is for an address. One that spells an IPv4 address as an IPv6 one is not: name constraints do not permit that.
func isFor(leaf *x509.Certificate, a netip.Addr) bool {
	return slices.ContainsFunc(leaf.IPAddresses, func(ip net.IP) bool {
		x, ok := netip.AddrFromSlice(ip)
		return ok && x == a
	})
}

// asker tells the group of the other end of a connection. fault.NotFound when it is not known.
type asker func(ctx context.Context, peer, local netip.AddrPort) (identity.Group, error)

// askAgent returns what asks the policy agent of this host whose debug server has the port. It knows groups by the marks of connections, which only the
// host's rules give.
func askAgent(port uint16) asker {
	client := policyhttp.NewPeerClient(port, askTimeout)
	return func(ctx context.Context, peer, local netip.AddrPort) (identity.Group, error) {
		p, err := client.Peer(ctx, peer, local, policy.TCP)
		return p.Group, err
	}
}
