package lab

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/internal/httpjson"
)

const (
	controllerPort = 4103
	daemonPort     = 23954
	askTime        = time.Second // for a daemon to answer
)

// Status is what there is and how it fares.
type Status struct {
	Name       string       `json:"name"`
	Dir        string       `json:"dir"`
	Overlay    netip.Prefix `json:"overlay"`
	Policy     Policy       `json:"policy"`
	Programs   []Program    `json:"programs"` // keeper, supervisor, controller, policy-server, nats-server
	Hosts      []Host       `json:"hosts"`
	Containers []Container  `json:"containers"`
	Paths      []Path       `json:"paths"`           // every ordered pair of containers, by source, then destination
	Names      []Name       `json:"names,omitempty"` // that containers have
	Edge       []Path       `json:"edge,omitempty"`  // with an outside: from each container to its addresses, then from it to mapped ports
}

// Program is a process of the lab. PID is its number outside of the lab, 0 while it does not run.
type Program struct {
	Name   string `json:"name"`
	PID    int    `json:"pid,omitempty"`
	Starts int    `json:"starts"` // by the present supervisor: 0 for one that it adopted
	Error  string `json:"error,omitempty"`
}

// Host is one host, in its daemon's words: State is ready, degraded, fenced or starting, or NoAnswer; Reason says what is
// missing. Lease is zero while there is none.
type Host struct {
	Name        string       `json:"name"`
	Underlay    netip.Addr   `json:"underlay"`
	Lease       netip.Prefix `json:"lease"`
	MTU         int          `json:"mtu,omitempty"`
	Peers       int          `json:"peers"` // other hosts that the daemon has made paths to
	State       string       `json:"state"`
	Reason      string       `json:"reason,omitempty"`
	Partitioned bool         `json:"partitioned,omitempty"`
	Leaving     bool         `json:"leaving,omitempty"`
	Daemon      Program      `json:"daemon"`
	Agent       Program      `json:"agent,omitzero"`        // with PolicyRequired, as the next two
	Enforcement string       `json:"enforcement,omitempty"` // in the policy agent's words: ready, degraded, starting, or NoAnswer
	Unenforced  string       `json:"unenforced,omitempty"`  // what the policy agent says is missing
	Resolver    Program      `json:"resolver,omitzero"`     // silk-dns, in a lab with names, as the next four
	Naming      string       `json:"naming,omitempty"`      // in the words of silk-dns: ready, degraded, cold, or NoAnswer
	Unnamed     string       `json:"unnamed,omitempty"`     // what silk-dns says is missing
	Proxy       Program      `json:"proxy,omitzero"`        // silk-tls
	Proxying    string       `json:"proxying,omitempty"`    // in the words of silk-tls: ready, degraded, or NoAnswer
	Unproxied   string       `json:"unproxied,omitempty"`   // what silk-tls says is missing
	Error       string       `json:"error,omitempty"`       // why the host is not as the lab wants it
}

// Two states of a host: what its daemon says when all is well, and what stands for a daemon that does not answer.
const (
	Ready    = "ready"
	NoAnswer = "no answer"
)

// Container is one container. Address is zero until it is attached.
type Container struct {
	Name      string     `json:"name"`
	Host      string     `json:"host"`
	Address   netip.Addr `json:"address"`
	Group     string     `json:"group,omitempty"` // policy group
	Index     int        `json:"index,omitempty"` // of the instance, in a lab with names
	Ports     []Port     `json:"ports,omitempty"` // of its host that lead to it
	Leaving   bool       `json:"leaving,omitempty"`
	Responder Program    `json:"responder"`
	Answers   bool       `json:"answers"` // the responder, to its host just now: a path that policy denies does not show whether there is one
	Error     string     `json:"error,omitempty"`
}

// Path says whether one container reached another by HTTP just now. At the edge one end is the outside.
type Path struct {
	From  string        `json:"from"`
	To    string        `json:"to"`            // at the edge, an address of the outside, or "10.0.0.11:9080:8080"
	Via   string        `json:"via,omitempty"` // at the edge, the container behind a mapped port
	OK    bool          `json:"ok"`
	Deny  bool          `json:"deny,omitempty"` // it was refused as policy refuses
	Time  time.Duration `json:"ns,omitempty"`   // from the request to the end of the answer
	Error string        `json:"error,omitempty"`
}

// Whole reports whether every host has a lease, paths to all others and is ready, every container is attached and answers its host, and every one reaches every other, or,
// with PolicyRequired, every host enforces policies and every path is open or denied. Mapped ports have to lead to their containers. In
// a lab with names every host has to know all of them, though it may not deny others yet, and to end TLS.
func (s Status) Whole() bool {
	for _, h := range s.Hosts {
		if !h.Lease.IsValid() || h.Peers < len(s.Hosts)-1 || h.State != Ready || h.Error != "" || s.Policy == PolicyRequired && h.Enforcement != Ready ||
			h.Naming != "" && h.Naming != Ready && h.Naming != cold || h.Proxying != "" && h.Proxying != Ready {
			return false
		}
	}
	if slices.ContainsFunc(s.Names, func(n Name) bool { return len(n.Missing) > 0 }) {
		return false
	}
	for _, c := range s.Containers {
		if !c.Address.IsValid() || c.Error != "" || !c.Answers {
			return false
		}
	}
	for _, p := range s.Edge {
		if !p.OK && (!p.Deny || p.Via != "") {
			return false
		}
	}
	n := len(s.Containers)
	return len(s.Hosts) > 0 && len(s.Paths) == n*(n-1) && !slices.ContainsFunc(s.Paths, func(p Path) bool { return !p.OK && !p.Deny })
}

// Path returns what is known of the path between two containers.
func (s Status) Path(from, to string) Path {
	for _, p := range s.Paths {
		if p.From == from && p.To == to {
			return p
		}
	}
	return Path{From: from, To: to, Error: "not attached"}
}

// status asks everything at once.
func (s *supervisor) status(ctx context.Context) Status {
	st := Status{Dir: s.dir, Overlay: Overlay, Hosts: []Host{}, Containers: []Container{}}
	s.mu.Lock()
	st.Name, st.Policy = s.j.Name, s.j.Policy
	entries, containers := slices.Clone(s.j.Hosts), slices.Clone(s.j.Containers)
	outside := s.j.Outside
	s.mu.Unlock()
	st.Programs = []Program{s.keeper.status(), {Name: roleSupervisor, PID: os.Getpid(), Starts: 1}, s.control.programStatus(roleController)}
	if st.Policy == "" {
		st.Policy = PolicyNone
	}
	if st.Policy == PolicyRequired {
		st.Programs = append(st.Programs, s.control.programStatus(rolePolicyServer))
	}
	st.Hosts = make([]Host, len(entries))
	var wg sync.WaitGroup
	var answering []bool
	for i, h := range entries {
		wg.Go(func() { st.Hosts[i] = s.hostStatus(ctx, h) })
	}
	for _, c := range containers {
		st.Containers = append(st.Containers, s.containerStatus(c))
	}
	wg.Go(func() { st.Paths = s.measure(ctx, st.Containers) })
	wg.Go(func() { answering = s.answering(ctx, containers) })
	if s.named() {
		st.Programs = append(st.Programs, s.control.programStatus(roleNATS))
		wg.Go(func() { st.Names = s.known(ctx, entries, st.Containers) })
	}
	if outside {
		st.Programs = append(st.Programs, s.outside.programStatus(outsideName))
		wg.Go(func() { st.Edge = s.measureEdge(ctx, st.Containers) })
	}
	wg.Wait()
	for i := range st.Containers {
		st.Containers[i].Answers = answering[i]
	}
	for _, paths := range [][]Path{st.Paths, st.Edge} {
		for i := range paths {
			paths[i].Deny = st.Policy == PolicyRequired && strings.Contains(paths[i].Error, refusal)
		}
	}
	return st
}

func (n *node) programStatus(role string) Program {
	n.mu.RLock()
	defer n.mu.RUnlock()
	for _, t := range n.programs {
		if t.role == role {
			return t.status()
		}
	}
	return Program{Name: role}
}

func (s *supervisor) hostStatus(ctx context.Context, h hostEntry) Host {
	st := Host{Name: h.Name, Underlay: address(h.Index), Partitioned: h.Partitioned, Leaving: h.Leaving}
	n, err := s.node(h.Name)
	if err != nil {
		st.State = NoAnswer
		return st
	}
	st.Daemon = n.programStatus(h.Name + "/silk-daemon")
	if info, err := n.info(ctx); err != nil {
		st.State = NoAnswer
	} else {
		st.Lease, st.MTU, st.State, st.Reason = info.lease(), info.MTU, info.Status, info.Reason
		st.Peers, _ = n.peers(ctx)
	}
	if s.policed() {
		st.Agent = n.programStatus(h.Name + "/vxlan-policy-agent")
		st.Enforcement, st.Unenforced = n.health(ctx, agentPort)
	}
	if s.named() {
		st.Resolver, st.Proxy = n.programStatus(h.Name+"/silk-dns"), n.programStatus(h.Name+"/silk-tls")
		st.Naming, st.Unnamed = n.health(ctx, resolverDebug)
		st.Proxying, st.Unproxied = n.health(ctx, proxyDebug)
	}
	if err := n.loop.Stats().LastError; err != nil {
		st.Error = err.Error()
	}
	return st
}

// answering returns which containers' responders answer their hosts.
func (s *supervisor) answering(ctx context.Context, containers []containerEntry) []bool {
	all, t := make([]bool, len(containers)), newTurns()
	var wg sync.WaitGroup
	for i, e := range containers {
		c := s.containerStatus(e)
		n, err := s.node(e.Host)
		if err != nil || !c.Address.IsValid() {
			continue
		}
		wg.Go(func() {
			err := n.use(func(sp *space) error {
				_, err := t.probe(ctx, sp.net, netip.AddrPortFrom(c.Address, HTTPPort), c.Name)
				return err
			})
			all[i] = err == nil
		})
	}
	wg.Wait()
	return all
}

func (s *supervisor) containerStatus(e containerEntry) Container {
	st := Container{Name: e.Name, Host: e.Host, Group: e.Group, Index: e.Index, Ports: e.Ports, Leaving: e.Leaving, Responder: Program{Name: e.Name + "/responder"}}
	n, err := s.node(e.Host)
	if err != nil {
		return st
	}
	n.mu.RLock()
	defer n.mu.RUnlock()
	c := n.containers[e.Name]
	if c == nil {
		return st
	}
	addr, err := c.state()
	st.Address = addr
	if err != nil {
		st.Error = err.Error()
	}
	if c.responder != nil {
		st.Responder = c.responder.status()
	}
	return st
}

// daemonInfo is what silk-daemon answers on /v1/network to anybody on its host.
type daemonInfo struct {
	Subnet string `json:"overlay_subnet"` // empty without a lease
	MTU    int    `json:"mtu"`
	Status string `json:"status"`
	Reason string `json:"reason"`
}

// lease returns the subnet, zero without one.
func (i daemonInfo) lease() netip.Prefix { p, _ := netip.ParsePrefix(i.Subnet); return p }

func (n *node) info(ctx context.Context) (info daemonInfo, err error) {
	err = n.ask(ctx, daemonPort, "/v1/network", &info)
	return info, err
}

// peers returns to how many other hosts the daemon has made paths. A refused connection shows a path only where the refusal comes from the other
// host: a packet without a tag is refused by its own.
func (n *node) peers(ctx context.Context) (int, error) {
	var health struct {
		Peers int `json:"peers"`
	}
	err := n.ask(ctx, daemonPort, "/health", &health)
	return health.Peers, err
}

// ask calls a program from within its host.
func (n *node) ask(ctx context.Context, port int, path string, out any) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	dial := func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = n.use(func(sp *space) error {
			return sp.net.Do(func() (err error) { c, err = new(net.Dialer).DialContext(ctx, network, addr); return err })
		})
		return c, err
	}
	hc := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	client := httpjson.Client{Base: fmt.Sprintf("http://127.0.0.1:%d", port), HTTP: hc, Limit: 1 << 20}
	return client.Do(ctx, http.MethodGet, path, nil, out)
}
