package cni

import (
	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/lease/mac"
)

// The result of an ADD, specification section 5. The versions differ little: before 1.0.0 an address says its family, and
// since 1.1.0 an interface its MTU.
type result struct {
	CNIVersion string         `json:"cniVersion"`
	Interfaces []resultDevice `json:"interfaces"`
	IPs        []resultIP     `json:"ips"`
	Routes     []resultRoute  `json:"routes"`
	DNS        *resultDNS     `json:"dns,omitempty"`
}

// resultDNS is also the key dns of the configuration.
type resultDNS struct {
	Nameservers []string `json:"nameservers,omitempty"`
	Domain      string   `json:"domain,omitempty"`
	Search      []string `json:"search,omitempty"`
	Options     []string `json:"options,omitempty"`
}

// empty reports whether it says nothing.
func (d resultDNS) empty() bool {
	return len(d.Nameservers) == 0 && d.Domain == "" && len(d.Search) == 0 && len(d.Options) == 0
}

type resultDevice struct {
	Name    string   `json:"name"`
	MAC     mac.Addr `json:"mac"`
	MTU     int      `json:"mtu,omitempty"`
	Sandbox string   `json:"sandbox,omitempty"`
}

type resultIP struct {
	Version   string `json:"version,omitempty"`
	Interface int    `json:"interface"` // index into interfaces
	Address   string `json:"address"`
	Gateway   string `json:"gateway"`
}

type resultRoute struct {
	Dst string `json:"dst"`
	GW  string `json:"gw"`
}

// resultOf words what was made of r for a runtime that named the namespace netns.
func resultOf(version string, r endpoint.Record, netns string) result {
	host := resultDevice{Name: r.Device, MAC: r.HostMAC}
	inside := resultDevice{Name: r.Interface, MAC: r.ContainerMAC, Sandbox: netns}
	if version == "1.1.0" {
		host.MTU, inside.MTU = r.MTU, r.MTU
	}
	out := result{CNIVersion: version, Interfaces: []resultDevice{host, inside}}
	for _, a := range r.Addresses {
		ip := resultIP{Interface: 1, Address: a.String(), Gateway: endpoint.Gateway.String()}
		if version == "0.3.1" || version == "0.4.0" {
			ip.Version = "4"
		}
		out.IPs = append(out.IPs, ip)
	}
	out.Routes = []resultRoute{{Dst: "0.0.0.0/0", GW: endpoint.Gateway.String()}}
	return out
}
