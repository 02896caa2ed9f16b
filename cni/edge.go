package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/plainjson"
)

// portMapping is one element of runtimeConfig.portMappings, in the spelling of the CNI conventions or in Garden's; names differ in case only.
type portMapping struct {
	HostPort       int    `json:"hostPort"`
	ContainerPort  int    `json:"containerPort"`
	HostPort2      int    `json:"host_port"`
	ContainerPort2 int    `json:"container_port"`
	Protocol       string `json:"protocol"`
	HostIP         string `json:"hostIP"`
}

// plain reads an element that is plain; false when it is not, and then m is of no use.
func (m *portMapping) plain(v []byte) bool {
	return plainjson.Each(v, func(name string, v []byte) bool {
		switch strings.ToLower(name) {
		case "hostport":
			return number(v, &m.HostPort)
		case "containerport":
			return number(v, &m.ContainerPort)
		case "host_port":
			return number(v, &m.HostPort2)
		case "container_port":
			return number(v, &m.ContainerPort2)
		case "protocol":
			return text(v, &m.Protocol)
		case "hostip":
			return text(v, &m.HostIP)
		}
		return true
	})
}

// portMaps returns what the runtime wants to lead to the container. A protocol that is not given is tcp.
func (c *config) portMaps() ([]endpoint.PortMap, error) {
	raw := c.RuntimeConfig.PortMappings
	if isNull(raw) {
		return nil, nil
	}
	var list []portMapping
	plain := plainjson.Elements(raw, func(v []byte) bool {
		var m portMapping
		ok := m.plain(v)
		list = append(list, m)
		return ok
	})
	if !plain {
		list = nil
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, fault.Invalidf("runtimeConfig.portMappings: %w", err)
		}
	}
	var out []endpoint.PortMap
	for i, m := range list {
		p, err := m.parse()
		if err != nil {
			return nil, fault.Invalidf("runtimeConfig.portMappings[%d]: %w", i, err)
		}
		if !slices.Contains(out, p) {
			out = append(out, p)
		}
		if len(out) > endpoint.MaxPorts { // to look through them again and again takes the square of their number
			return nil, fault.Invalidf("runtimeConfig.portMappings: expected at most %d", endpoint.MaxPorts)
		}
	}
	return out, nil
}

func (m portMapping) parse() (endpoint.PortMap, error) {
	port := func(name string, a, b int) (uint16, error) {
		if a != 0 && b != 0 && a != b {
			return 0, fmt.Errorf("%s is %d and %d", name, a, b)
		}
		switch a |= b; {
		case a == 0:
			return 0, fmt.Errorf("%s is 0: cannot allocate port 0: expected 1 to 65535", name)
		case a < 0 || a > 65535:
			return 0, fmt.Errorf("%s is %d: expected 1 to 65535", name, a)
		}
		return uint16(a), nil
	}
	p := endpoint.PortMap{Protocol: strings.ToLower(m.Protocol)}
	if p.Protocol == "" {
		p.Protocol = "tcp"
	}
	var err error
	if p.HostPort, err = port("host port", m.HostPort, m.HostPort2); err != nil {
		return p, err
	}
	if p.ContainerPort, err = port("container port", m.ContainerPort, m.ContainerPort2); err != nil {
		return p, err
	}
	if m.HostIP == "" {
		return p, nil
	}
	if p.HostIP, err = netip.ParseAddr(m.HostIP); err != nil || !p.HostIP.Is4() {
		return p, fmt.Errorf("hostIP is %q: expected an IPv4 address of this host, or none for all of them", m.HostIP)
	}
	if p.HostIP.IsUnspecified() {
		p.HostIP = netip.Addr{}
	}
	return p, nil
}

// bandwidth is runtimeConfig.bandwidth of the CNI conventions: bits a second and bits.
type bandwidth struct {
	IngressRate  uint64 `json:"ingressRate"`
	IngressBurst uint64 `json:"ingressBurst"`
	EgressRate   uint64 `json:"egressRate"`
	EgressBurst  uint64 `json:"egressBurst"`
}

// kilobit is what the keys rate and burst count in, as those of the deployed jobs do.
const kilobit = 1024

// limits returns what the container's traffic is to be kept to, nil for nothing. What the runtime says counts, else the keys of the plugin do, in both
// directions.
func (c *config) limits() (*endpoint.Limits, error) {
	var l endpoint.Limits
	if raw := c.RuntimeConfig.Bandwidth; !isNull(raw) {
		var b bandwidth
		if err := json.Unmarshal(raw, &b); err != nil {
			return nil, fault.Invalidf("runtimeConfig.bandwidth: %w", err)
		}
		l = endpoint.Limits(b)
	}
	if l == (endpoint.Limits{}) {
		rate, burst := uint64(c.Rate)*kilobit, uint64(c.Burst)*kilobit
		l = endpoint.Limits{IngressRate: rate, IngressBurst: burst, EgressRate: rate, EgressBurst: burst}
	}
	if l == (endpoint.Limits{}) {
		return nil, nil
	}
	return &l, nil
}
