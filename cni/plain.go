package cni

import (
	"encoding/json"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/internal/plainjson"
)

// What an ADD reads and writes is nearly always plain JSON, for which these functions stand in for encoding/json: that would look
// at the types by reflection first, 0.5 ms of an ADD in all. What is not plain they leave to it.

// plain reads a configuration that is plain; false when it is not, and then c is of no use.
func (c *config) plain(input []byte) bool {
	texts := map[string]*string{
		"cniVersion": &c.CNIVersion, "name": &c.Name, "subnetFile": &c.SubnetFile, "datastore": &c.Datastore, "endpointDir": &c.EndpointDir,
		"policy": &c.Policy, "policy_agent_force_poll_address": &c.PolicyAgent, "policy_group": &c.PolicyGroup, "no_masquerade_cidr_range": &c.NoMasquerade,
	}
	return plainjson.Each(input, func(name string, v []byte) bool {
		switch name {
		case "daemonPort":
			return number(v, &c.DaemonPort)
		case "mtu":
			return number(v, &c.MTU)
		case "rate":
			return number(v, &c.Rate)
		case "burst":
			return number(v, &c.Burst)
		case "policy_timeout_seconds":
			return number(v, &c.PolicyTimeout)
		case "metadata":
			c.Metadata = v
		case "advertise":
			c.Advertise = v
		case "tls":
			c.TLS = v
		case "dns":
			c.DNS = v
		case "prevResult":
			c.PrevResult = v
		case "cni.dev/valid-attachments":
			c.Valid1 = v
		case "cni.dev/attachments":
			c.Valid2 = v
		case "runtimeConfig":
			return isNull(v) || plainjson.Each(v, c.plainRuntime)
		default:
			if p, ok := texts[name]; ok {
				return text(v, p)
			}
			return !alike(name, configKeys...)
		}
		return true
	})
}

// plainRuntime reads a member of runtimeConfig.
func (c *config) plainRuntime(name string, v []byte) bool {
	switch name {
	case "portMappings":
		c.RuntimeConfig.PortMappings = v
	case "bandwidth":
		c.RuntimeConfig.Bandwidth = v
	case "netOutRules":
		c.RuntimeConfig.NetOutRules = v
	default:
		return !alike(name, "ips", "portMappings", "bandwidth", "netOutRules", "mac")
	}
	return true
}

// configKeys are the keys of a configuration that are ours.
var configKeys = []string{
	"cniVersion", "name", "daemonPort", "subnetFile", "mtu", "rate", "burst", "datastore", "endpointDir", "policy", "policy_agent_force_poll_address", "policy_group",
	"policy_timeout_seconds", "no_masquerade_cidr_range", "metadata", "advertise", "tls", "dns", "prevResult", "runtimeConfig", "cni.dev/valid-attachments", "cni.dev/attachments",
}

// alike reports whether a name is one of those but for case, which encoding/json passes over.
func alike(name string, names ...string) bool {
	return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, name) })
}

// text reads a value into p. Null leaves what is there.
func text(v []byte, p *string) bool {
	if isNull(v) {
		return true
	}
	s, ok := plainjson.Text(v)
	*p = s
	return ok
}

func number(v []byte, p *int) bool {
	if isNull(v) {
		return true
	}
	n, ok := plainjson.Int(v)
	*p = n
	return ok
}

// texts reads a list of texts into p.
func texts(v []byte, p *[]string) bool {
	if isNull(v) {
		return true
	}
	list := []string{}
	ok := plainjson.Elements(v, func(v []byte) bool {
		s, ok := plainjson.Text(v)
		list = append(list, s)
		return ok
	})
	*p = list
	return ok
}

// truth reads a value into p. Null leaves what is there.
func truth(v []byte, p *bool) bool {
	switch string(v) {
	case "true", "false":
		*p = v[0] == 't'
	case "null":
	default:
		return false
	}
	return true
}

// plain reads a daemon's answer that is plain.
func (a *answer) plain(body []byte) bool {
	return plainjson.Each(body, func(name string, v []byte) bool {
		switch name {
		case "overlay_subnet":
			return text(v, &a.Subnet)
		case "overlay_network":
			return text(v, &a.Overlay)
		case "mtu":
			return number(v, &a.MTU)
		case "vtep":
			return text(v, &a.VTEP)
		case "status":
			return text(v, &a.Status)
		case "reason":
			return text(v, &a.Reason)
		}
		return !alike(name, "overlay_subnet", "overlay_network", "mtu", "vtep", "status", "reason")
	})
}

// groupOf returns the policy group in metadata that are an object, "" for none.
func groupOf(metadata []byte) (string, error) {
	var group string
	if plainjson.Each(metadata, func(name string, v []byte) bool {
		if name == "policy_group_id" {
			return text(v, &group)
		}
		return !alike(name, "policy_group_id")
	}) {
		return group, nil
	}
	var m struct {
		Group string `json:"policy_group_id"`
	}
	err := json.Unmarshal(metadata, &m)
	return m.Group, err
}

// plain words a result as print does; false when it is not plain.
func (r result) plain() ([]byte, bool) {
	var w plainjson.Writer
	w.Begin("", '{')
	w.Text("cniVersion", r.CNIVersion)
	w.Begin("interfaces", '[')
	for _, d := range r.Interfaces {
		w.Begin("", '{')
		w.Text("name", d.Name)
		w.Text("mac", d.MAC.String())
		if d.MTU != 0 {
			w.Uint("mtu", uint64(d.MTU))
		}
		if d.Sandbox != "" {
			w.Text("sandbox", d.Sandbox)
		}
		w.End('}')
	}
	w.End(']')
	w.Begin("ips", '[')
	for _, ip := range r.IPs {
		w.Begin("", '{')
		if ip.Version != "" {
			w.Text("version", ip.Version)
		}
		w.Uint("interface", uint64(ip.Interface))
		w.Text("address", ip.Address)
		w.Text("gateway", ip.Gateway)
		w.End('}')
	}
	w.End(']')
	w.Begin("routes", '[')
	for _, route := range r.Routes {
		w.Begin("", '{')
		w.Text("dst", route.Dst)
		w.Text("gw", route.GW)
		w.End('}')
	}
	w.End(']')
	if r.DNS != nil {
		r.DNS.write(&w)
	}
	w.End('}')
	b, ok := w.Bytes()
	if !ok {
		return nil, false
	}
	return plainjson.Indent(b, indent), true
}

func (d *resultDNS) write(w *plainjson.Writer) {
	list := func(name string, texts []string) {
		if len(texts) == 0 {
			return
		}
		w.Begin(name, '[')
		for _, s := range texts {
			w.Text("", s)
		}
		w.End(']')
	}
	w.Begin("dns", '{')
	list("nameservers", d.Nameservers)
	if d.Domain != "" {
		w.Text("domain", d.Domain)
	}
	list("search", d.Search)
	list("options", d.Options)
	w.End('}')
}
