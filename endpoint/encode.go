package endpoint

import (
	"bytes"
	"encoding/json"
	"fmt"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/plainjson"
)

// encode returns a record as its file has it.
func encode(r Record) ([]byte, error) {
	out, ok := r.plain()
	if !ok {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false) // metadata stay as they are, for comparison with the next ADD's
		if err := e.Encode(r); err != nil {
			return nil, fmt.Errorf("encode endpoint %v: %w", r.Key, err)
		}
		out = b.Bytes()
	}
	if len(out) > maxRecord {
		return nil, fault.Invalidf("record of endpoint %v has %d bytes: expected at most %d", r.Key, len(out), maxRecord)
	}
	return out, nil
}

// plain is encode for a record that is plain JSON; false when it is not. The first use of encoding/json costs more than all that
// is done with a record's file.
func (r Record) plain() ([]byte, bool) {
	if r.MTU < 0 || !r.Subnet.IsValid() || !r.Subnet.Addr().Is4() || len(r.Addresses) == 0 {
		return nil, false
	}
	var w plainjson.Writer
	w.Begin("", '{')
	w.Text("network", r.Network)
	w.Text("container", r.Container)
	w.Text("interface", r.Interface)
	w.Begin("namespace", '{')
	w.Uint("dev", r.Namespace.Dev)
	w.Uint("ino", r.Namespace.Ino)
	w.End('}')
	w.Text("netns", r.Path)
	w.Begin("addresses", '[')
	for _, a := range r.Addresses {
		if !a.IsValid() || !a.Addr().Is4() {
			return nil, false
		}
		w.Text("", a.String())
	}
	w.End(']')
	w.Text("subnet", r.Subnet.String())
	switch {
	case r.Requested.Is4():
		w.Text("requested", r.Requested.String())
	case r.Requested.IsValid():
		return nil, false
	}
	w.Text("policy_group", r.Group)
	if len(r.Metadata) > 0 {
		w.Raw("metadata", r.Metadata)
	}
	if !r.plainEdge(&w) {
		return nil, false
	}
	if !r.plainNames(&w) {
		return nil, false
	}
	w.Text("device", r.Device)
	w.Text("host_mac", r.HostMAC.String())
	w.Text("container_mac", r.ContainerMAC.String())
	w.Uint("mtu", uint64(r.MTU))
	w.End('}')
	b, ok := w.Bytes()
	return append(b, '\n'), ok
}

// plainEdge writes what the runtime may ask for beside an address; false when it is not plain.
func (r Record) plainEdge(w *plainjson.Writer) bool {
	if len(r.PortMaps) > 0 {
		w.Begin("port_maps", '[')
		for _, m := range r.PortMaps {
			w.Begin("", '{')
			if m.HostIP.IsValid() {
				if !m.HostIP.Is4() {
					return false
				}
				w.Text("host_ip", m.HostIP.String())
			}
			w.Uint("host_port", uint64(m.HostPort))
			w.Uint("container_port", uint64(m.ContainerPort))
			w.Text("protocol", m.Protocol)
			w.End('}')
		}
		w.End(']')
	}
	if len(r.NetOut) > 0 {
		w.Raw("net_out", r.NetOut)
	}
	if l := r.Limits; l != nil {
		w.Begin("limits", '{')
		for _, v := range []struct {
			name  string
			value uint64
		}{{"ingress_rate", l.IngressRate}, {"ingress_burst", l.IngressBurst}, {"egress_rate", l.EgressRate}, {"egress_burst", l.EgressBurst}} {
			if v.value != 0 {
				w.Uint(v.name, v.value)
			}
		}
		w.End('}')
	}
	return true
}

// plainNames writes names and ports for TLS; false when they are not plain.
func (r Record) plainNames(w *plainjson.Writer) bool {
	if a := r.Advertise; a != nil {
		w.Begin("advertise", '{')
		if a.Names == nil {
			return false // null
		}
		w.Begin("names", '[')
		for _, n := range a.Names {
			w.Text("", n)
		}
		w.End(']')
		if a.Port != 0 {
			w.Uint("port", uint64(a.Port))
		}
		if a.Index != nil {
			if *a.Index < 0 {
				return false
			}
			w.Uint("index", uint64(*a.Index))
		}
		w.End('}')
	}
	if len(r.TLS) == 0 {
		return true
	}
	w.Begin("tls", '[')
	for _, l := range r.TLS {
		w.Begin("", '{')
		w.Uint("listen", uint64(l.Listen))
		w.Uint("forward", uint64(l.Forward))
		if len(l.ALPN) > 0 {
			w.Begin("alpn", '[')
			for _, p := range l.ALPN {
				w.Text("", p)
			}
			w.End(']')
		}
		if l.ClientAuth {
			w.True("client_auth")
		}
		w.End('}')
	}
	w.End(']')
	return true
}
