package policyhttp

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/localsocket"
	"code.cloudfoundry.org/silk/policy"
)

// Peer is who began a connection to a container, as the policy agent of the container's host tells.
type Peer struct {
	Tag   identity.Tag   `json:"tag"`
	Group identity.Group `json:"group"`
}

// PathPeer is where the debug server of a policy agent tells, and who listens at PeerSocket.
const PathPeer = "/peer"

// PeerSocket returns the address of the local socket, as package net has it, at which the agent whose debug server has the port tells about peers.
func PeerSocket(port uint16) string { return localsocket.Name("peer", port) }

// PeerClient asks the policy agent of this host, at its PeerSocket. Anybody can listen at a port or a socket while the agent does not; only an agent of this
// process's own user or root is believed. It is safe for concurrent use.
type PeerClient struct{ api httpjson.Client }

// peerConns bounds how many connections to the agent there are; so many are kept.
const peerConns = 16

// NewPeerClient returns a client of the agent whose debug server has the port. A question that takes longer than timeout is given up.
func NewPeerClient(port uint16, timeout time.Duration) *PeerClient {
	t := &http.Transport{MaxIdleConns: peerConns, MaxIdleConnsPerHost: peerConns, MaxConnsPerHost: peerConns, IdleConnTimeout: time.Minute}
	t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return localsocket.Dial(ctx, PeerSocket(port))
	}
	return &PeerClient{httpjson.Client{Base: "http://agent", Limit: 64 << 10, HTTP: &http.Client{Timeout: timeout, Transport: t}}}
}

// Peer returns who began the connection from source to destination, as its destination sees both; a container that accepted it may ask at
// once. fault.NotFound when no such connection passes this host, no policy let it in, or its group is not known; fault.Unavailable when
// the agent does not answer.
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
