package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"golang.org/x/sys/unix"
)

// setKind is how a set is declared.
type setKind struct {
	text     string // as nft(8) has it
	keyType  uint32 // 6 bits for each field, as nft numbers its types
	fields   []uint32
	flags    uint32
	verdicts bool // a verdict map
}

// The types of nft (nftables: include/datatype.h).
const (
	typeIPv4, typeProtocol, typeService, typeICMPType, typeMark, typeICMPCode, typeIfname = 7, 12, 13, 14, 19, 32, 41

	typeVerdict = 0xffffff00 // NFT_DATA_VERDICT
	flagConcat  = 0x80       // NFT_SET_CONCAT
)

func concat(types ...uint32) (t uint32) {
	for _, x := range types {
		t = t<<6 | x
	}
	return t
}

var (
	kindSources = &setKind{"type ifname . ipv4_addr : verdict;", concat(typeIfname, typeIPv4), []uint32{16, 4}, unix.NFT_SET_MAP, true}
	kindOwn     = &setKind{"type ifname . ipv4_addr;", concat(typeIfname, typeIPv4), []uint32{16, 4}, 0, false}
	kindTo      = &setKind{"type ipv4_addr : verdict;", typeIPv4, []uint32{4}, unix.NFT_SET_MAP, true}
	kindService = &setKind{"type ipv4_addr . inet_proto . inet_service;", concat(typeIPv4, typeProtocol, typeService), []uint32{4, 1, 2}, 0, false}
	kindIngress = &setKind{"type ipv4_addr . inet_service;", concat(typeIPv4, typeService), []uint32{4, 2}, 0, false}
	kindAllow   = &setKind{"type mark . inet_proto . inet_service;", concat(typeMark, typeProtocol, typeService), []uint32{4, 1, 2}, 0, false}
	kindRanges  = &setKind{"type mark . inet_proto . inet_service; flags interval;", concat(typeMark, typeProtocol, typeService), []uint32{4, 1, 2},
		unix.NFT_SET_INTERVAL | flagConcat, false}
	kindLog    = &setKind{"type ifname; size 4096; flags dynamic,timeout;", typeIfname, []uint32{16}, unix.NFT_SET_EVAL | unix.NFT_SET_TIMEOUT, false}
	kindShards = &setKind{"type mark : verdict;", typeMark, []uint32{4}, unix.NFT_SET_MAP, true}
	kindEnded  = &setKind{"type ipv4_addr . inet_service . ipv4_addr . inet_service . inet_proto; flags timeout;",
		concat(typeIPv4, typeService, typeIPv4, typeService, typeProtocol), []uint32{4, 2, 4, 2, 1}, unix.NFT_SET_TIMEOUT, false}
)

// size is how many elements there can be; 0: any number.
func (k *setKind) size() uint32 {
	switch k {
	case kindLog:
		return maxLimited
	case kindRates:
		return maxRates
	}
	return 0
}

func (k *setKind) ranges() bool { return k.flags&unix.NFT_SET_INTERVAL != 0 }

// keyLen is the length of a key in bytes: each field takes whole 32-bit words.
func (k *setKind) keyLen() (n uint32) {
	for _, f := range k.fields {
		n += (f + 3) &^ 3
	}
	return n
}

// kindOf returns how a set of this name is to be declared, nil for a name that is none of ours.
func kindOf(name string) *setKind {
	switch name {
	case setSources:
		return kindSources
	case setOwn:
		return kindOwn
	case setDestinations, setStreams, setOutside:
		return kindTo
	case setServices:
		return kindService
	case setIngress:
		return kindIngress
	case setEnded:
		return kindEnded
	}
	switch prefix, _, _ := strings.Cut(name, "-"); prefix {
	case "allow":
		return kindAllow
	case "ranges":
		return kindRanges
	case "shards":
		return kindShards
	case "ports":
		return kindPorts
	case "messages":
		return kindMessages
	case "others":
		return kindOthers
	case "rates":
		return kindRates
	case "log":
		return kindLog
	}
	return nil
}

// volatile reports whether the elements of a set are of no ruleset: packets and Cut write them.
func volatile(name string) bool {
	return name == setEnded || kindOf(name) == kindLog || kindOf(name) == kindRates
}

// elem is an element of one of the small sets: its key and, in a map, the chain that it leads to.
type elem struct{ key, chain string }

// set is a set with its elements, sorted. Those of allowances have only allow, those of what may be reached outside only spans, all others only elems.
type set struct {
	name  string
	allow []firewall.Allow
	elems []elem
	spans []firewall.Span
}

func (s *set) len() int { return len(s.allow) + len(s.elems) + len(s.spans) }

// wish is the table as it should be.
type wish struct {
	frame  frame
	chains []chain
	sets   []set
}

func (w *wish) elements() (n int) {
	for i := range w.sets {
		n += w.sets[i].len()
	}
	return n
}

// builder makes wishes. It remembers chains, since they cost more than anything else here: of 250 groups few change at a time.
type builder struct {
	frame  frame
	static []chain
	made   map[string]chain // by name and sets
}

func (b *builder) use(f frame) {
	if b.made == nil || b.frame != f {
		*b = builder{f, f.chains(), map[string]chain{}}
	}
}

func (b *builder) chain(key string, make func() chain) chain {
	c, ok := b.made[key]
	if !ok {
		c = make()
		b.made[key] = c
	}
	return c
}

// wish returns what a ruleset asks for. have are the sets of ranges that are there: those that are right keep their names.
func (b *builder) wish(f frame, rs *firewall.Ruleset, have map[string]*set) *wish {
	b.use(f)
	if len(b.made) > 4*(len(rs.Groups)+2*len(rs.Sources))+1024 {
		clear(b.made)
	}
	w := &wish{frame: f, chains: slices.Clone(b.static), sets: small(rs, f)}
	for _, tag := range senders(rs) {
		w.chains = append(w.chains, b.chain(fromChain(tag), func() chain { return from(tag, f.streams()) }),
			b.chain(awayChain(tag), func() chain { return away(f.vtep, tag) }))
	}
	b.egress(w, rs, have)
	if rs.Unrestricted {
		return w
	}
	for _, g := range rs.Groups {
		singles, ranges := split(g.Allowed)
		allowName, rule := "", rangesRule{}
		if len(singles) > 0 {
			allowName = allowSet(g.Tag)
			w.sets = append(w.sets, set{name: allowName, allow: singles})
			if f.streams() {
				w.chains = append(w.chains, b.chain(knownChain(g.Tag), func() chain { return known(g.Tag) }))
			}
		}
		if len(ranges) > 0 {
			rule = b.ranges(w, g.Tag, ranges, have)
		}
		key := toChain(g.Tag) + " " + allowName + " " + rule.set
		w.chains = append(w.chains, b.chain(key, func() chain { return to(f.connMask, g.Tag, allowName, rule) }))
	}
	return w
}

// senders returns the tags that endpoints here send with, sorted.
func senders(rs *firewall.Ruleset) []identity.Tag {
	tags := make([]identity.Tag, 0, len(rs.Sources))
	for _, s := range rs.Sources {
		tags = append(tags, s.Tag)
	}
	slices.Sort(tags)
	return slices.Compact(tags)
}

// split parts single ports from ranges. The usual group has none of one kind, and then nothing is copied.
func split(list []firewall.Allow) (singles, ranges []firewall.Allow) {
	n := 0
	for _, a := range list {
		if !a.Ports.Single() {
			n++
		}
	}
	switch n {
	case 0:
		return list, nil
	case len(list):
		return nil, list
	}
	singles, ranges = make([]firewall.Allow, 0, len(list)-n), make([]firewall.Allow, 0, n)
	for _, a := range list {
		if a.Ports.Single() {
			singles = append(singles, a)
		} else {
			ranges = append(ranges, a)
		}
	}
	return singles, ranges
}

// small returns the sets that are no allowances.
func small(rs *firewall.Ruleset, f frame) []set {
	known := f.streams()
	streams := set{name: setStreams}
	single := map[identity.Tag]bool{} // groups that have allowances for single ports
	for _, g := range rs.Groups {
		single[g.Tag] = known && slices.ContainsFunc(g.Allowed, func(a firewall.Allow) bool { return a.Ports.Single() })
	}
	sources, own, to := set{name: setSources}, set{name: setOwn}, set{name: setDestinations}
	services, ingress := set{name: setServices}, set{name: setIngress}
	for _, s := range rs.Sources {
		key := string(deviceName(s.Device)) + string(s.Address.AsSlice())
		sources.elems = append(sources.elems, elem{key, fromChain(s.Tag)})
		own.elems = append(own.elems, elem{key: key})
	}
	for _, d := range rs.Destinations {
		leads := chainUnknown
		switch {
		case rs.Unrestricted:
			leads = chainAny
		case d.Group != 0:
			leads = toChain(d.Group)
			if single[d.Group] {
				streams.elems = append(streams.elems, elem{string(d.Address.AsSlice()), knownChain(d.Group)})
			}
		}
		to.elems = append(to.elems, elem{string(d.Address.AsSlice()), leads})
	}
	for _, s := range rs.Services {
		services.elems = append(services.elems, elem{key: string(s.Address.AsSlice()) + string([]byte{byte(s.Protocol), 0, 0, 0}) + port32(s.Port)})
	}
	for _, i := range rs.Ingress {
		ingress.elems = append(ingress.elems, elem{key: string(i.Address.AsSlice()) + port32(i.Port)})
	}
	all := []set{sources, own, to, streams, services, ingress, {name: setEnded}, {name: f.log.deniedSet()}, {name: f.log.udpSet()}}
	for _, s := range all {
		slices.SortFunc(s.elems, compareElem)
	}
	return all
}

func compareElem(a, b elem) int { return strings.Compare(a.key, b.key) }

// port32 is a port in a concatenation.
func port32(p uint16) string { return string([]byte{byte(p >> 8), byte(p), 0, 0}) }

// allowKey returns the key of an allowance, in sets of ranges that of its first or last port.
func allowKey(a firewall.Allow, port uint16, ranges bool) [12]byte {
	k := [12]byte{4: byte(a.Protocol), 8: byte(port >> 8), 9: byte(port)}
	if ranges {
		binary.BigEndian.PutUint32(k[:], uint32(a.Source))
	} else {
		binary.NativeEndian.PutUint32(k[:], uint32(a.Source))
	}
	return k
}

// parseAllow is the inverse of allowKey for the keys of both ends, which are the same in a set of single ports.
func parseAllow(first, last []byte, ranges bool) (firewall.Allow, bool) {
	if len(first) != 12 || len(last) != 12 {
		return firewall.Allow{}, false
	}
	tag := binary.NativeEndian.Uint32(first)
	if ranges {
		tag = binary.BigEndian.Uint32(first)
	}
	a := firewall.Allow{Source: identity.Tag(tag), Protocol: policy.Protocol(first[4]),
		Ports: policy.Ports{First: binary.BigEndian.Uint16(first[8:]), Last: binary.BigEndian.Uint16(last[8:])}}
	return a, allowKey(a, a.Ports.First, ranges) == [12]byte(first) && allowKey(a, a.Ports.Last, ranges) == [12]byte(last)
}

// elementText is an element as nft(8) writes it.
func elementText(name string, e elem) string {
	addr := func(i int) string { a, _ := netip.AddrFromSlice([]byte(e.key[i : i+4])); return a.String() }
	port := func(i int) string { return fmt.Sprint(binary.BigEndian.Uint16([]byte(e.key[i:]))) }
	text := ""
	switch kindOf(name) {
	case kindSources, kindOwn:
		text = fmt.Sprintf("%q . %s", strings.TrimRight(e.key[:16], "\x00"), addr(16))
	case kindTo:
		text = addr(0)
	case kindShards:
		text = fmt.Sprintf("0x%08x", binary.NativeEndian.Uint32([]byte(e.key)))
	case kindService:
		text = addr(0) + " . " + policy.Protocol(e.key[4]).String() + " . " + port(8)
	case kindIngress:
		text = addr(0) + " . " + port(4)
	}
	if e.chain != "" {
		text += " : jump " + e.chain
	}
	return text
}

func allowText(a firewall.Allow) string {
	return fmt.Sprintf("0x%08x . %v . %v", uint32(a.Source), a.Protocol, a.Ports)
}
