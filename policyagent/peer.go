package policyagent

import (
	"errors"
	"fmt"
	"math/bits"
	"net/http"
	"net/netip"
	"net/url"
	"sync"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/localsocket"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

// peers tells who began a connection to a container of this host. The kernel noted the tag in the connection's mark when a policy let its
// first packet in, before the container could hear of it.
type peers struct {
	mu    sync.Mutex
	table *kernel.Conntrack // nil until somebody asks, and after a failure
}

// tagged are the groups of tags, as policy-server says.
type tagged struct {
	version uint64 // of what is held
	absent  int
	router  identity.Tag
	groups  map[identity.Tag]identity.Group
}

// peerHandler serves the local socket for those who have to know that it is the agent whom they ask.
func (a *agent) peerHandler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET "+policyhttp.PathPeer, a.servePeer)
	return m
}

// peerTask serves the local socket.
func (a *agent) peerTask() service.Task {
	return localsocket.Task("peer", policyhttp.PeerSocket(uint16(a.cfg.DebugPort)), a.peerHandler(), a.log)
}

// servePeer answers GET /peer?source=IP:PORT&destination=IP:PORT&protocol=tcp, addresses and ports being those that the destination sees.
func (a *agent) servePeer(w http.ResponseWriter, r *http.Request) {
	c, err := parsePeerQuery(r.URL.RawQuery)
	if err != nil {
		httpjson.WriteError(w, http.StatusBadRequest, err.Error())
		return
	}
	p, err := a.peer(c)
	switch {
	case errors.Is(err, fault.NotFound):
		httpjson.WriteError(w, http.StatusNotFound, err.Error())
	case err != nil:
		a.log.Warn("peer of a connection could not be looked up", "error", err)
		httpjson.WriteError(w, http.StatusInternalServerError, "the kernel's table of connections cannot be read")
	default:
		httpjson.Write(w, http.StatusOK, p)
	}
}

// connection names a connection as the one who answers sees it.
type connection struct {
	protocol            policy.Protocol
	source, destination netip.AddrPort
}

// parsePeerQuery reads a query. Without a protocol it is tcp's.
func parsePeerQuery(raw string) (c connection, err error) {
	q, err := url.ParseQuery(raw)
	if err != nil {
		return c, fmt.Errorf("query: %w", err)
	}
	for _, end := range []struct {
		name string
		into *netip.AddrPort
	}{{"source", &c.source}, {"destination", &c.destination}} {
		v, err := netip.ParseAddrPort(q.Get(end.name))
		if err != nil || v.Port() == 0 || v.Addr().Zone() != "" || len(q[end.name]) != 1 {
			return c, fmt.Errorf("%s=%.60q: expected an address and a port such as 10.255.30.2:41000, once", end.name, q[end.name])
		}
		*end.into = netip.AddrPortFrom(v.Addr().Unmap(), v.Port())
	}
	c.protocol = policy.TCP
	if v, ok := q["protocol"]; ok {
		if len(v) != 1 {
			return c, fmt.Errorf("protocol=%.60q: expected it once", v)
		}
		c.protocol, err = policy.ParseProtocol(v[0])
	}
	return c, err
}

// peer returns who began a connection. fault.NotFound when that is not known.
func (a *agent) peer(c connection) (policyhttp.Peer, error) {
	f, found, err := a.peers.find(a.ns, c)
	if err != nil {
		return policyhttp.Peer{}, err
	}
	if !found {
		return policyhttp.Peer{}, fault.NotFoundf("no %v connection from %v to %v passes this host", c.protocol, c.source, c.destination)
	}
	mask := a.cfg.ConnMask
	tag := identity.Tag(f.Mark & mask >> bits.TrailingZeros32(mask))
	if tag == 0 {
		return policyhttp.Peer{}, fault.NotFoundf("the %v connection from %v to %v bears no tag: no policy let it in", c.protocol, c.source, c.destination)
	}
	g, ok := a.groupOf(tag)
	if !ok {
		return policyhttp.Peer{}, fault.NotFoundf("the connection bears the tag %v: no policy known to this host names its group", tag)
	}
	return policyhttp.Peer{Tag: tag, Group: g}, nil
}

// find asks the kernel, which takes microseconds, with a socket that is opened again when it has failed.
func (p *peers) find(ns *kernel.NS, c connection) (kernel.Flow, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.table == nil {
		t, err := kernel.DialConntrack(ns)
		if err != nil {
			return kernel.Flow{}, false, err
		}
		p.table = t
	}
	f, found, err := p.table.Find(uint8(c.protocol), c.source, c.destination)
	if err != nil {
		p.table.Close()
		p.table = nil
	}
	return f, found, err
}

// close lets go of the socket.
func (p *peers) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.table
	p.table = nil
	return t.Close()
}

// groupOf returns the group of a tag, by the policies that are held for this host.
func (a *agent) groupOf(tag identity.Tag) (identity.Group, bool) {
	a.mu.Lock()
	n := tagged{version: a.version, absent: a.held.Absent(), router: a.router}
	if k := a.tagged; k != nil && k.version == n.version && k.absent == n.absent && k.router == n.router {
		g, ok := k.groups[tag]
		a.mu.Unlock()
		return g, ok
	}
	held := a.held.State()
	a.mu.Unlock()
	n.groups = make(map[identity.Tag]identity.Group)
	for _, r := range held.Absent {
		n.groups[r.SourceTag], n.groups[r.DestinationTag] = r.Source, r.Destination
	}
	for _, r := range held.Listed { // which has the last word
		n.groups[r.SourceTag], n.groups[r.DestinationTag] = r.Source, r.Destination
	}
	if n.router != 0 {
		n.groups[n.router] = identity.IngressRouter
	}
	a.mu.Lock()
	a.tagged = &n
	a.mu.Unlock()
	g, ok := n.groups[tag]
	return g, ok
}
