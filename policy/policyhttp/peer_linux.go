package policyhttp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"syscall"
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

// PathPeer is where the debug server of a policy agent tells, and who listens at PeerSocket.
const PathPeer = "/peer"

// PeerSocket returns the address of the local socket, as package net has it, at which the agent whose debug server has the port tells about peers. It is an
// abstract one: like the port it belongs to a network namespace, and is gone with its process.
func PeerSocket(port uint16) string { return "@silk/peer/127.0.0.1:" + strconv.Itoa(int(port)) }

// PeerClient asks the policy agent of this host, at its PeerSocket. Anybody can listen at a port or a socket while the agent does not; only an agent of this
// process's own user or root is believed. It is safe for concurrent use.
type PeerClient struct{ api httpjson.Client }

// peerConns bounds how many connections to the agent there are; so many are kept.
const peerConns = 16

// NewPeerClient returns a client of the agent whose debug server has the port. A question that takes longer than timeout is given up.
func NewPeerClient(port uint16, timeout time.Duration) *PeerClient {
	t := &http.Transport{MaxIdleConns: peerConns, MaxIdleConnsPerHost: peerConns, MaxConnsPerHost: peerConns, IdleConnTimeout: time.Minute}
	t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return dialPeer(ctx, PeerSocket(port)) }
	return &PeerClient{httpjson.Client{Base: "http://agent", Limit: 64 << 10, HTTP: &http.Client{Timeout: timeout, Transport: t}}}
}

func dialPeer(ctx context.Context, socket string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	user, err := userOf(c.(*net.UnixConn))
	if own := os.Geteuid(); err == nil && user != own && user != 0 {
		err = fmt.Errorf("user %d listens at %s: expected user %d or root", user, socket, own)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// userOf returns who listened for the connection.
func userOf(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *syscall.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		peer, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil || failed != nil {
		return 0, errors.Join(err, failed)
	}
	return int(peer.Uid), nil
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
