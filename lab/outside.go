package lab

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"sync"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// The outside is one more place on the underlay: no host of Silk's, with two addresses and a responder behind both. What containers may reach of it is
// for security groups to say, and from it their mapped ports are asked.
const (
	outsideName  = "outside"
	outsideIndex = MaxHosts + 90 // decides its addresses, of which there are two: 10.0.0.200 and 10.0.0.201
)

// outsideAddresses returns where the outside is.
func outsideAddresses() []netip.Addr {
	return []netip.Addr{address(outsideIndex), address(outsideIndex + 1)}
}

// Port is a port of a container's host that leads to one of the container's, over TCP.
type Port struct {
	Host      uint16 `json:"host"`
	Container uint16 `json:"container"`
}

// String returns "9080:8080".
func (p Port) String() string { return fmt.Sprintf("%d:%d", p.Host, p.Container) }

// ParsePort reads what String writes. Anything else is fault.Invalid.
func ParsePort(s string) (Port, error) {
	host, inside, _ := strings.Cut(s, ":")
	h, err := strconv.ParseUint(host, 10, 16)
	c, cerr := strconv.ParseUint(inside, 10, 16)
	if err != nil || cerr != nil || h == 0 || c == 0 {
		return Port{}, fault.Invalidf("port %q: expected the host's and the container's, such as 9080:8080", s)
	}
	return Port{uint16(h), uint16(c)}, nil
}

// portMappings returns ports as the capability of that name has them.
func portMappings(ports []Port) []map[string]any {
	var all []map[string]any
	for _, p := range ports {
		all = append(all, map[string]any{"hostPort": p.Host, "containerPort": p.Container, "protocol": "tcp"})
	}
	return all
}

// freePorts reports, as fault.Conflict, a port that another container on the host has.
func (j *journal) freePorts(host string, ports []Port) error {
	taken := map[uint16]string{}
	for _, c := range j.Containers {
		for _, p := range c.Ports {
			if c.Host == host {
				taken[p.Host] = c.Name
			}
		}
	}
	for _, p := range ports {
		if holder := taken[p.Host]; holder != "" {
			return fault.Conflictf("port %d of %s leads to %s already", p.Host, host, holder)
		}
		taken[p.Host] = "the container itself"
	}
	return nil
}

// measureEdge lets every attached container ask the outside for its name, at both of its addresses, and the outside every container with a mapped port.
func (s *supervisor) measureEdge(ctx context.Context, containers []Container) (edge []Path) {
	var tries []func(*Path) error
	t := newTurns()
	for _, c := range containers {
		if !c.Address.IsValid() {
			continue
		}
		for _, a := range outsideAddresses() {
			edge = append(edge, Path{From: c.Name, To: a.String()})
			tries = append(tries, func(p *Path) (err error) {
				return s.fromContainer(c, func(ns *kernel.NS) (err error) {
					p.Time, err = t.probe(ctx, ns, netip.AddrPortFrom(a, HTTPPort), outsideName)
					return err
				})
			})
		}
	}
	for _, c := range containers {
		n, err := s.node(c.Host)
		if err != nil {
			continue
		}
		for _, port := range c.Ports {
			to := netip.AddrPortFrom(address(n.index), port.Host)
			edge = append(edge, Path{From: outsideName, To: fmt.Sprintf("%v:%d", to, port.Container), Via: c.Name})
			tries = append(tries, func(p *Path) error {
				return s.outside.use(func(sp *space) (err error) { p.Time, err = t.probe(ctx, sp.net, to, c.Name); return err })
			})
		}
	}
	var wg sync.WaitGroup
	for i := range edge {
		wg.Go(func() {
			err := tries[i](&edge[i])
			if edge[i].OK = err == nil; err != nil {
				edge[i].Error = err.Error()
			}
		})
	}
	wg.Wait()
	return edge
}
