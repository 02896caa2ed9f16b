package policyhttp

import (
	"context"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/policy"
)

// Peer is who began a connection to a container, as the policy agent of the container's host tells.
type Peer struct {
	Tag   identity.Tag   `json:"tag"`
	Group identity.Group `json:"group"`
}

// PathPeer is where the debug server of a policy agent tells.
const PathPeer = "/peer"

// PeerClient asks the policy agent of this host. It is safe for concurrent use.
type PeerClient struct{ api httpjson.Client }

// peerConns bounds how many connections to the agent are kept.
const peerConns = 16

// NewPeerClient returns a client of the agent whose debug server listens on address ("127.0.0.1:8721"). A question that takes longer than timeout is given up.
func NewPeerClient(address string, timeout time.Duration) *PeerClient {
	return &PeerClient{httpjson.Client{
		Base: "http://" + address, Limit: 64 << 10,
		HTTP: &http.Client{Timeout: timeout, Transport: &http.Transport{MaxIdleConns: peerConns, MaxIdleConnsPerHost: peerConns, MaxConnsPerHost: peerConns, IdleConnTimeout: time.Minute}},
	}}
}

// Peer returns who began the connection from source to destination, as its destination sees both; a container that accepted it may ask at once. fault.NotFound when
// no such connection passes this host, no policy let it in, or its group is not known; fault.Unavailable when the agent does not answer.
func (c *PeerClient) Peer(ctx context.Context, source, destination netip.AddrPort, protocol policy.Protocol) (Peer, error) {
	q := url.Values{"source": {source.String()}, "destination": {destination.String()}, "protocol": {protocol.String()}}
	var p Peer
	err := c.api.Do(ctx, http.MethodGet, PathPeer+"?"+q.Encode(), nil, &p)
	if err == nil && (p.Tag == 0 || p.Group.Validate() != nil) {
		err = fault.Unavailablef("peer of %v: the agent answers with tag %v and group %.80q", destination, p.Tag, p.Group)
	}
	if err != nil {
		return Peer{}, err
	}
	return p, nil
}

// Close closes the connections that nobody uses.
func (c *PeerClient) Close() { c.api.HTTP.CloseIdleConnections() }
