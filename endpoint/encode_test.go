package endpoint

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
)

// usual is a record as nearly all are.
func usual() Record {
	r := Record{
		Key: Key{"silk", "c1", "eth0"}, Namespace: kernel.NSID{Dev: 4, Ino: 4026531840}, Path: "/run/netns/c1", Subnet: netip.MustParsePrefix("10.255.30.0/24"),
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.255.30.2/32")}, Group: "app", Metadata: json.RawMessage(`{"policy_group_id":"app"}`), MTU: 1450,
	}
	r.name()
	return r
}

func TestTheUsualRecordIsPlain(t *testing.T) {
	if _, ok := usual().plain(); !ok {
		t.Error("a record is not plain")
	}
	r, index := usual(), 0
	r.Advertise = &Advertisement{Names: []string{"api.apps.internal"}, Port: 8080, Index: &index}
	r.TLS = []TLSListener{{Listen: 61443, Forward: 8080, ALPN: []string{"h2"}, ClientAuth: true}}
	b, ok := r.plain()
	if !ok {
		t.Error("a record with names and ports for TLS is not plain")
	}
	if got, err := decode(bytes.NewReader(b), entry{file: r.Key.file(r.Addresses)}); err != nil || !got.Advertise.equal(r.Advertise) || !slices.EqualFunc(got.TLS, r.TLS, TLSListener.equal) {
		t.Errorf("%s came back as %+v, %v", b, got, err)
	}
}

// TestNetOutIsKept: a list without rules is not the absence of a list.
func TestNetOutIsKept(t *testing.T) {
	for in, want := range map[string]string{"": "", "[]": "[]", "[ { \"protocol\": 1, \"networks\": [] } ]": `[{"protocol":1,"networks":[]}]`} {
		r := usual()
		if in != "" {
			r.NetOut = json.RawMessage(in)
		}
		if _, ok := r.plain(); !ok {
			t.Errorf("a record with egress rules %q is not plain", in)
		}
		b, err := encode(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decode(bytes.NewReader(b), entry{file: r.Key.file(r.Addresses)})
		if err != nil || string(got.NetOut) != want || (got.NetOut == nil) != (in == "") {
			t.Errorf("egress rules %q came back as %q, %v", in, got.NetOut, err)
		}
	}
}

// What is written without encoding/json must be what encoding/json would have written.
func FuzzPlainRecord(f *testing.F) {
	f.Add("silk", "c1", "/run/netns/c1", "app", []byte(`{"policy_group_id":"app"}`), []byte(`[{"protocol": 1}]`), []byte{10, 255, 30, 2}, 32, 1450)
	f.Add("silk", "c1", "/proc/1/ns/net", "<app>", []byte(` { } `), []byte(`[]`), []byte{}, 24, -1)
	f.Add("silk", "c1", "", "ä", []byte(`{"a":"<&>"}`), []byte(nil), make([]byte, 16), 129, 1450)
	f.Fuzz(func(t *testing.T, network, container, path, group string, metadata, netOut, addr []byte, bits, mtu int) {
		r := usual()
		r.Network, r.Container, r.Path, r.Group, r.Metadata, r.NetOut, r.MTU = network, container, path, group, metadata, netOut, mtu
		a, _ := netip.AddrFromSlice(addr)
		for i := range min(bits&3, len(addr)) {
			r.PortMaps = append(r.PortMaps, PortMap{HostIP: a, HostPort: uint16(mtu), ContainerPort: uint16(i), Protocol: group})
			r.Limits = &Limits{IngressRate: uint64(i), EgressBurst: uint64(mtu)}
			r.Advertise = &Advertisement{Names: []string{network, container}[i&1:], Port: uint16(mtu)}
			if i > 0 {
				r.Advertise.Index = &mtu
			}
			r.TLS = append(r.TLS, TLSListener{Listen: uint16(mtu), Forward: uint16(i), ALPN: []string{group, path}[:i&1], ClientAuth: i&1 == 0})
		}
		if r.Requested = a; bits&1 == 1 {
			r.Subnet = netip.PrefixFrom(a, bits)
			r.Addresses = append(r.Addresses, r.Subnet)
		}
		got, ok := r.plain()
		if !ok {
			return
		}
		var want bytes.Buffer
		e := json.NewEncoder(&want)
		e.SetEscapeHTML(false)
		if err := e.Encode(r); err != nil {
			t.Fatalf("wrote %s, encoding/json refused: %v", got, err)
		}
		if !bytes.Equal(got, want.Bytes()) {
			t.Fatalf("wrote\n%s\nencoding/json\n%s", got, want.Bytes())
		}
	})
}
