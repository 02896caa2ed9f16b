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
	if len(r.PortMaps) > 0 || r.Limits != nil || r.MTU < 0 || !r.Subnet.IsValid() || !r.Subnet.Addr().Is4() || len(r.Addresses) == 0 {
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
	if len(r.NetOut) > 0 {
		w.Raw("net_out", r.NetOut)
	}
	w.Text("device", r.Device)
	w.Text("host_mac", r.HostMAC.String())
	w.Text("container_mac", r.ContainerMAC.String())
	w.Uint("mtu", uint64(r.MTU))
	w.End('}')
	b, ok := w.Bytes()
	return append(b, '\n'), ok
}
