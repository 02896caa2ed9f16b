package policyagent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// container is what is attached to the host under one key: what its record, or its entry in the deployed store, says of it.
type container struct {
	key       endpoint.Key // of an entry in the store only the container's id is known
	namespace kernel.NSID  // zero when it is not known
	endpoints []firewall.Endpoint
	metadata  json.RawMessage // what the runtime says of it
	netOut    json.RawMessage // the runtime's rules for what it may reach outside, if it gave any
}

// group returns the policy group, "" for none.
func (c container) group() identity.Group {
	if len(c.endpoints) == 0 {
		return ""
	}
	return c.endpoints[0].Group
}

// same reports whether two containers are one, with one identity and the same to reach: a key, an address and the number of a namespace may be given again.
func (c container) same(o container) bool {
	return c.key == o.key && c.namespace == o.namespace && bytes.Equal(c.metadata, o.metadata) && bytes.Equal(c.netOut, o.netOut) && slices.EqualFunc(c.endpoints, o.endpoints, func(a, b firewall.Endpoint) bool {
		return a.Device == b.Device && a.Address == b.Address && a.Group == b.Group
	})
}

// identities returns as whom the kernel is to know its addresses.
func (c container) identities() []endpoint.Identity {
	var out []endpoint.Identity
	says := endpoint.Says(c.metadata, c.netOut)
	for _, e := range c.endpoints {
		out = append(out, endpoint.Identity{Address: e.Address, Namespace: c.namespace, Group: string(e.Group), Says: says})
	}
	return out
}

// hosted is all that is attached to the host, and what of it cannot be made out.
type hosted struct {
	containers []container
	problems   []firewall.Problem
	strangers  int // devices of containers of which nothing is known
}

// groups returns the policy groups there, sorted, without duplicates.
func (h hosted) groups() []identity.Group {
	all := []identity.Group{}
	for _, c := range h.containers {
		if g := c.group(); g.Validate() == nil {
			all = append(all, g)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// listed returns the addresses of the containers whose identities are listed, when the list of all could not be written for some reason. A container
// that had rules and was not in the list would hand them to the next one with its address, if this agent were away then. It stays closed.
func (h *hosted) listed(list []endpoint.Identity, why error) []firewall.Endpoint {
	known := map[endpoint.Identity]bool{}
	for _, i := range list {
		known[i] = true
	}
	var out []firewall.Endpoint
	for _, c := range h.containers {
		if !slices.ContainsFunc(c.identities(), func(i endpoint.Identity) bool { return !known[i] }) {
			out = append(out, c.endpoints...)
			continue
		}
		for _, e := range c.endpoints {
			h.problems = append(h.problems, firewall.Problem{What: e.String(), Err: why})
		}
	}
	return out
}

// endpoints returns the addresses of all containers.
func (h hosted) endpoints() []firewall.Endpoint {
	var out []firewall.Endpoint
	for _, c := range h.containers {
		out = append(out, c.endpoints...)
	}
	return out
}

// sources is where containers are found.
type sources struct {
	ns      *kernel.NS // nil for the process's own
	records *endpoint.Dir
	store   string // of the deployed wrapper plugin; "" means none
	entries map[string]storeEntry
	read    bool // entries are the store's, as last read
}

// list returns the containers that the kernel has devices for. What one record says is nothing to the others. A store that cannot be read
// counts as it was when it last could; until it has been read once that is an error, because a list without its containers would
// cut them off.
func (s *sources) list(ctx context.Context) (hosted, error) {
	devices, err := endpoint.Containers(s.ns)
	if err != nil {
		return hosted{}, err
	}
	known := make(map[string]bool, len(devices)) // by device: whether it has been accounted for
	for _, d := range devices {
		known[d.Device] = false
	}
	var h hosted
	records, bad, err := s.records.List()
	if err != nil {
		return hosted{}, err
	}
	for _, b := range bad {
		h.problems = append(h.problems, firewall.Problem{What: "record of " + b.Key.String(), Err: b.Err})
		for _, a := range b.Addresses {
			if _, there := known[endpoint.Device(a)]; there {
				known[endpoint.Device(a)] = true
			}
		}
	}
	for _, r := range records {
		if _, there := known[r.Device]; !there {
			continue // its device is still to come, or has gone
		}
		known[r.Device] = true
		c := container{key: r.Key, namespace: r.Namespace, metadata: r.Metadata, netOut: r.NetOut}
		ports := h.ports(r.Key.String(), r.Metadata)
		for _, a := range r.Addresses {
			c.endpoints = append(c.endpoints, firewall.Endpoint{Device: r.Device, Address: a.Addr(), Group: identity.Group(r.Group), Ingress: ports})
		}
		h.containers = append(h.containers, c)
	}
	if err := s.stored(ctx, &h, known); err != nil {
		return hosted{}, err
	}
	for _, accounted := range known {
		if !accounted {
			h.strangers++
		}
	}
	return h, nil
}

// stored adds the containers that only the deployed store knows.
func (s *sources) stored(ctx context.Context, h *hosted, known map[string]bool) error {
	if s.store == "" {
		return nil
	}
	entries, err := readStore(ctx, s.store)
	switch {
	case err == nil:
		s.entries, s.read = entries, true
	case !s.read:
		return err
	default:
		h.problems = append(h.problems, firewall.Problem{What: "store " + s.store, Err: err})
	}
	for id, e := range s.entries {
		c, err := e.container(id)
		if err != nil {
			h.problems = append(h.problems, firewall.Problem{What: "entry " + strconv.Quote(id) + " of " + s.store, Err: err})
			continue
		}
		if accounted, there := known[c.endpoints[0].Device]; there && !accounted {
			known[c.endpoints[0].Device] = true
			c.endpoints[0].Ingress = h.ports(id, e.Metadata)
			h.containers = append(h.containers, c)
		}
	}
	return nil
}

// container returns what an entry says of container id.
func (e storeEntry) container(id string) (container, error) {
	a, err := netip.ParseAddr(e.IP)
	if err != nil || !a.Is4() {
		return container{}, fault.Invalidf("ip %.40q: expected an IPv4 address", e.IP)
	}
	var m struct {
		Group string `json:"policy_group_id"`
	}
	if len(e.Metadata) > 0 {
		if err := json.Unmarshal(e.Metadata, &m); err != nil {
			return container{}, fault.New(fault.Invalid, fmt.Errorf("metadata: %w", err))
		}
	}
	only := firewall.Endpoint{Device: endpoint.Device(a), Address: a, Group: identity.Group(m.Group)}
	return container{key: endpoint.Key{Container: id}, endpoints: []firewall.Endpoint{only}, metadata: e.Metadata}, nil
}

// ports returns the ports that a container declares, as far as they can be read.
func (h *hosted) ports(id string, metadata json.RawMessage) []uint16 {
	ports, err := ingressPorts(metadata)
	if err != nil {
		h.problems = append(h.problems, firewall.Problem{What: "ports of " + id, Err: err})
	}
	return ports
}

// ingressPorts reads the ports that a container's metadata declare: "8080, 2222", or nothing. The good ones are returned beside an error.
func ingressPorts(metadata json.RawMessage) ([]uint16, error) {
	var m struct {
		Ports json.RawMessage `json:"ports"`
	}
	if len(metadata) == 0 || json.Unmarshal(metadata, &m) != nil || len(m.Ports) == 0 || string(m.Ports) == "null" {
		return nil, nil
	}
	var list string
	if err := json.Unmarshal(m.Ports, &list); err != nil {
		return nil, fault.Invalidf("metadata.ports: expected a text such as \"8080,2222\"")
	}
	var out []uint16
	var errs []error
	for s := range strings.SplitSeq(list, ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || n == 0 {
			errs = append(errs, fault.Invalidf("metadata.ports: %.20q: expected a port, 1 to 65535", s))
			continue
		}
		out = append(out, uint16(n))
	}
	return out, errors.Join(errs...)
}
