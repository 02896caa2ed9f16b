package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// nfAttrs yields the attributes of an nftables message, which begins with a nfgenmsg.
func nfAttrs(body []byte) iter.Seq2[uint16, []byte] { return kernel.Attrs(body[min(4, len(body)):]) }

// number reads a 32-bit attribute in network order, 0 if it is shorter.
func number(v []byte) uint32 {
	if len(v) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(v)
}

// observe reads the whole table and calls meanwhile again and again. What is not of the kinds that Set makes leaves the state odd.
func observe(ns *kernel.NS, c *kernel.Conn, own bool, meanwhile func()) (*state, error) {
	s := &state{meanwhile: meanwhile, chains: map[string]string{}, counts: map[string]bool{}, sets: map[string]*set{}}
	var b kernel.Batch
	request(&b, unix.NFT_MSG_GETTABLE, 0, Name)
	err := c.Get(&b, func(m kernel.Message) error {
		s.exists = true
		for t, v := range nfAttrs(m.Body) {
			if t == unix.NFTA_TABLE_FLAGS {
				s.flags(number(v), own)
			}
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up nft table inet %s: %w", Name, err)
	}
	for _, what := range []func(*kernel.Conn) error{s.observeChains, s.observeRules, s.observeObjects, s.observeSets} {
		if err := what(c); err != nil {
			return nil, err
		}
	}
	if s.sets[setEnded] != nil {
		s.ended, err = anyEnded(ns)
	}
	return s, err
}

// anyEnded reports whether the set of what Cut ended has elements. There may be hundreds of thousands, and the kernel lists a set at a cost that
// grows with the square of its elements.
func anyEnded(ns *kernel.NS) (bool, error) {
	c, err := kernel.DialNetfilter(ns)
	if err != nil {
		return false, err
	}
	defer c.Close()
	var b kernel.Batch
	request(&b, unix.NFT_MSG_GETSETELEM, 0, Name, setEnded)
	any, err := c.Any(&b, func(m kernel.Message) bool { return hasElements(m.Body) })
	if err != nil {
		return false, fmt.Errorf("list nft elements of table inet %s: %w", Name, err)
	}
	return any, nil
}

func (s *state) flags(flags uint32, own bool) {
	s.owned = flags&(tableOwner|tablePersist) == tableOwner|tablePersist
	if flags&^(tableOwner|tablePersist) != 0 {
		s.odd = "it is dormant"
	}
	if flags != 0 && !own {
		s.odd = "it has an owner"
	}
}

// dump asks for all objects of a kind in our table. The kernel marks a list as interrupted by a change to any table. If it lists ours alone, a change
// to another one does it no harm, and the state notes that it stands only if ours was not touched meanwhile: programs that change nftables all the
// time must not keep us from seeing.
func (s *state) dump(c *kernel.Conn, what string, msg uint16, begin func(), each func(kernel.Message) error, names ...string) error {
	var b kernel.Batch
	request(&b, msg, 0, append([]string{Name}, names...)...)
	others := false // older kernels list those of all tables
	ours := func(m kernel.Message) error {
		s.meanwhile()
		if len(m.Body) >= 4 && m.Body[0] == unix.NFPROTO_INET {
			for t, v := range nfAttrs(m.Body) { // the table is attribute 1 of all of them
				if t == 1 && kernel.Text(v) == Name {
					return each(m)
				}
			}
		}
		others = true
		return nil
	}
	interrupted, err := c.DumpOnce(&b, begin, ours)
	if interrupted && (others || err != nil) {
		interrupted, err = false, c.Dump(&b, begin, ours)
	}
	s.doubtful = s.doubtful || interrupted
	if err != nil {
		return fmt.Errorf("list nft %s of table inet %s: %w", what, Name, err)
	}
	return nil
}

func (s *state) observeChains(c *kernel.Conn) error {
	return s.dump(c, "chains", unix.NFT_MSG_GETCHAIN, func() { clear(s.chains) }, func(m kernel.Message) error {
		name, declared := parseChain(m.Body)
		s.chains[name] = declared
		return nil
	})
}

// parseChain reads a chain: its name and its declaration, which is that of a hook of ours or else of no chain of ours.
func parseChain(body []byte) (name, declared string) {
	typ, policy, num, priority, flags, base := "", uint32(0), uint32(0), uint32(0), uint32(0), false
	for t, v := range nfAttrs(body) {
		switch t {
		case unix.NFTA_CHAIN_NAME:
			name = kernel.Text(v)
		case unix.NFTA_CHAIN_TYPE:
			typ = kernel.Text(v)
		case unix.NFTA_CHAIN_POLICY:
			policy = number(v)
		case attrChainFlags:
			flags = number(v)
		case unix.NFTA_CHAIN_HOOK:
			base = true
			for t, v := range kernel.Attrs(v) {
				switch t {
				case unix.NFTA_HOOK_HOOKNUM:
					num = number(v)
				case unix.NFTA_HOOK_PRIORITY:
					priority = number(v)
				}
			}
		}
	}
	if !base {
		return name, ""
	}
	h := hook(num + 1)
	if typ != "filter" || policy != nfAccept || priority != 0 || flags&^1 != 0 || h.String() == "" {
		return name, "another hook"
	}
	return name, h.String()
}

func (s *state) observeRules(c *kernel.Conn) error {
	declared := map[string]string{}
	for name, d := range s.chains {
		declared[name] = d
	}
	rules := map[string]*strings.Builder{}
	err := s.dump(c, "rules", unix.NFT_MSG_GETRULE, func() { clear(rules) }, func(m kernel.Message) error {
		name := ""
		for t, v := range nfAttrs(m.Body) {
			switch t {
			case unix.NFTA_RULE_CHAIN:
				name = kernel.Text(v)
				if rules[name] == nil {
					rules[name] = &strings.Builder{}
				}
			case unix.NFTA_RULE_EXPRESSIONS:
				rules[name].WriteString("\n" + canonical(v))
			}
		}
		return nil
	})
	for name, text := range rules {
		s.chains[name] = declared[name] + text.String()
	}
	return err
}

func (s *state) observeObjects(c *kernel.Conn) error {
	return s.dump(c, "objects", unix.NFT_MSG_GETOBJ, func() { clear(s.counts) }, func(m kernel.Message) error {
		name, typ := "", uint32(0)
		for t, v := range nfAttrs(m.Body) {
			switch t {
			case unix.NFTA_OBJ_NAME:
				name = kernel.Text(v)
			case unix.NFTA_OBJ_TYPE:
				typ = number(v)
			}
		}
		if typ != unix.NFT_OBJECT_COUNTER || !slices.Contains(counters(), name) {
			s.odd = fmt.Sprintf("it has an object %.40q", name)
		}
		s.counts[name] = true
		return nil
	})
}

func (s *state) observeSets(c *kernel.Conn) error {
	var odd []string
	err := s.dump(c, "sets", unix.NFT_MSG_GETSET, func() { clear(s.sets); odd = nil }, func(m kernel.Message) error {
		name, ok := parseSet(m.Body)
		if !ok {
			odd = append(odd, name)
			return nil
		}
		s.sets[name] = &set{name: name}
		return nil
	})
	if err != nil {
		return err
	}
	for _, x := range s.sets {
		if volatile(x.name) {
			continue
		}
		ok := true
		err := s.dump(c, "elements", unix.NFT_MSG_GETSETELEM, func() { *x = set{name: x.name}; ok = true }, func(m kernel.Message) error {
			ok = parseElements(m.Body, x) && ok
			return nil
		}, x.name)
		if err != nil {
			return err
		}
		if !ok {
			odd = append(odd, x.name)
		}
		x.arrange()
	}
	if len(odd) > 0 {
		s.odd = fmt.Sprintf("its set %.40q is another's", odd[0])
	}
	return nil
}

// arrange sorts a set as listed. The kernel may list an element twice while it makes a hash table larger, and the second would be deleted as one too
// many: with the first.
func (s *set) arrange() {
	slices.SortFunc(s.allow, firewall.CompareAllow)
	slices.SortFunc(s.elems, cmpElem)
	slices.SortFunc(s.spans, firewall.CompareSpan)
	s.allow, s.elems, s.spans = slices.Compact(s.allow), slices.Compact(s.elems), slices.Compact(s.spans)
}

// parseSet reads a set's name. It is ok if the set is declared as kindOf says.
func parseSet(body []byte) (name string, ok bool) {
	var flags, keyType, keyLen, dataType, size, policy uint32
	for t, v := range nfAttrs(body) {
		switch t {
		case unix.NFTA_SET_NAME:
			name = kernel.Text(v)
		case unix.NFTA_SET_FLAGS:
			flags = number(v)
		case unix.NFTA_SET_KEY_TYPE:
			keyType = number(v)
		case unix.NFTA_SET_KEY_LEN:
			keyLen = number(v)
		case unix.NFTA_SET_DATA_TYPE:
			dataType = number(v)
		case unix.NFTA_SET_POLICY:
			policy = number(v)
		case unix.NFTA_SET_DESC:
			for t, v := range kernel.Attrs(v) {
				if t == unix.NFTA_SET_DESC_SIZE {
					size = number(v)
				}
			}
		}
	}
	k := kindOf(name)
	if k == nil {
		return name, false
	}
	return name, flags == k.flags && keyType == k.keyType && keyLen == k.keyLen() && size == k.size() && policy == 0 && (dataType == typeVerdict) == k.verdicts
}

func hasElements(body []byte) bool {
	for t, list := range nfAttrs(body) {
		if t == unix.NFTA_SET_ELEM_LIST_ELEMENTS && len(list) > 0 {
			return true
		}
	}
	return false
}

// parseElements appends the elements in a message to x; not ok when one is of a form that Set never makes.
func parseElements(body []byte, x *set) (ok bool) {
	k := kindOf(x.name)
	if k == nil {
		return false
	}
	for t, list := range nfAttrs(body) {
		if t != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		for _, item := range kernel.Attrs(list) {
			if !parseElement(item, k, x) {
				return false
			}
		}
	}
	return true
}

func parseElement(item []byte, k *setKind, x *set) bool {
	var key, end []byte
	chain, code := "", int32(0)
	for t, v := range kernel.Attrs(item) {
		switch t {
		case unix.NFTA_SET_ELEM_KEY:
			key = dataValue(v)
		case attrKeyEnd:
			end = dataValue(v)
		case unix.NFTA_SET_ELEM_DATA:
			chain, code = verdictOf(v)
		case unix.NFTA_SET_ELEM_PAD:
		default: // flags (the element that matches everything), timeouts, expressions
			return false
		}
	}
	if len(key) != int(k.keyLen()) || k.ranges() != (end != nil) || k.verdicts != (code == verdictJump) {
		return false
	}
	switch k {
	case kindAllow, kindRanges:
	case kindPorts, kindMessages, kindOthers:
		s, ok := parseSpan(x.name, key, end)
		x.spans = append(x.spans, s)
		return ok
	default:
		x.elems = append(x.elems, elem{string(key), chain})
		return true
	}
	if end == nil {
		end = key
	}
	a, ok := parseAllow(key, end, k == kindRanges)
	x.allow = append(x.allow, a)
	return ok
}

func dataValue(b []byte) []byte {
	for t, v := range kernel.Attrs(b) {
		if t == unix.NFTA_DATA_VALUE {
			return v
		}
	}
	return nil
}

func verdictOf(b []byte) (chain string, code int32) {
	for t, v := range kernel.Attrs(b) {
		if t != unix.NFTA_DATA_VERDICT {
			continue
		}
		for t, v := range kernel.Attrs(v) {
			switch t {
			case unix.NFTA_VERDICT_CODE:
				code = int32(number(v))
			case unix.NFTA_VERDICT_CHAIN:
				chain = kernel.Text(v)
			}
		}
	}
	return chain, code
}
