package nat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// request appends a request about the table and, by name, about a set or the rules of a chain in it: in these messages the
// table is attribute 1 and the name attribute 2.
func request(b *kernel.Batch, msg uint16, flags int, names ...string) {
	b.Add(kernel.NFTables(msg), flags, kernel.NFGen(unix.NFPROTO_INET))
	for i, n := range names {
		b.String(uint16(i+1), n)
	}
}

// requestChain appends a request about our chain.
func requestChain(b *kernel.Batch, msg uint16, flags int) {
	request(b, msg, flags, Table)
	b.String(unix.NFTA_CHAIN_NAME, chainName)
}

// nfAttrs yields the attributes of an nftables message, which begins with a nfgenmsg.
func nfAttrs(body []byte) iter.Seq2[uint16, []byte] { return kernel.Attrs(body[min(4, len(body)):]) }

// observe reads what the kernel has of ours: one question for all objects, then the contents of those that are there.
func observe(c *kernel.Conn) (state, error) {
	gen, err := c.Generation()
	if err != nil {
		return state{}, err
	}
	s := state{generation: gen, sets: map[string]setState{}}
	var b kernel.Batch
	request(&b, unix.NFT_MSG_GETTABLE, 0, Table)
	requestChain(&b, unix.NFT_MSG_GETCHAIN, 0)
	request(&b, unix.NFT_MSG_GETSET, 0, Table, setLocal)
	request(&b, unix.NFT_MSG_GETSET, 0, Table, setNoMasquerade)
	answers, err := c.Query(&b)
	if err != nil {
		return state{}, err
	}
	for _, a := range answers {
		if a.Err != nil && !errors.Is(a.Err, unix.ENOENT) {
			return state{}, fmt.Errorf("look up address translation: %w", a.Err)
		}
	}
	if answers[0].Err != nil {
		return s, nil
	}
	s.table = true
	ours := uint32(0)
	for _, a := range answers[1:] {
		if a.Err == nil {
			ours++
		}
	}
	s.others = tableUse(answers[0].Body) > ours
	if answers[1].Err == nil {
		if s.chain = wrong; isOurChain(answers[1].Body) {
			s.chain = right
		}
		if s.rules, err = observeRules(c); err != nil {
			return state{}, err
		}
	}
	for i, name := range []string{setLocal, setNoMasquerade} {
		if answers[2+i].Err != nil {
			continue
		}
		set := setState{is: wrong}
		if isOurSet(answers[2+i].Body) {
			if set, err = observeElements(c, name); err != nil {
				return state{}, err
			}
		}
		s.sets[name] = set
	}
	return s, nil
}

// tableUse returns how many chains, sets and other objects a table has.
func tableUse(body []byte) uint32 {
	for t, v := range nfAttrs(body) {
		if t == unix.NFTA_TABLE_USE {
			return big32(v)
		}
	}
	return ^uint32(0) // not told: assume that others use it
}

// chainUse returns how many rules a base chain has.
func chainUse(body []byte) uint32 {
	for t, v := range nfAttrs(body) {
		if t == unix.NFTA_CHAIN_USE {
			return big32(v)
		}
	}
	return 0 // not told
}

func observeRules(c *kernel.Conn) ([]string, error) {
	var b kernel.Batch
	request(&b, unix.NFT_MSG_GETRULE, 0, Table, chainName)
	var rules []string
	err := c.Dump(&b, func() { rules = nil }, func(m kernel.Message) error {
		rules = append(rules, recognise(m.Body))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list rules of nft chain %s: %w", chainName, err)
	}
	return rules, nil
}

// observeElements reads a set of ours. One that matches everything, or holds what is no address, is another's.
func observeElements(c *kernel.Conn, name string) (setState, error) {
	var b kernel.Batch
	request(&b, unix.NFT_MSG_GETSETELEM, 0, Table, name)
	var marks []mark
	odd := false
	err := c.Dump(&b, func() { marks, odd = nil, false }, func(m kernel.Message) error {
		list, ok := parseElements(m.Body)
		marks, odd = append(marks, list...), odd || !ok
		return nil
	})
	if err != nil {
		return setState{}, fmt.Errorf("list elements of nft set %s: %w", name, err)
	}
	if odd {
		return setState{is: wrong}, nil
	}
	return setState{right, spansOfMarks(marks)}, nil
}

// parseElements reads the elements in a message; not ok when one has no address.
func parseElements(body []byte) (marks []mark, ok bool) {
	for t, list := range nfAttrs(body) {
		if t != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		for _, elem := range kernel.Attrs(list) {
			var m mark
			is := false
			for t, v := range kernel.Attrs(elem) {
				switch t {
				case unix.NFTA_SET_ELEM_KEY:
					for t, v := range kernel.Attrs(v) {
						if t == unix.NFTA_DATA_VALUE && len(v) == 4 {
							m.at, is = binary.BigEndian.Uint32(v), true
						}
					}
				case unix.NFTA_SET_ELEM_FLAGS:
					m.end = big32(v)&unix.NFT_SET_ELEM_INTERVAL_END != 0
				}
			}
			if !is {
				return nil, false
			}
			marks = append(marks, m)
		}
	}
	return marks, true
}

// big32 reads a 32-bit attribute in network order, 0 if it is shorter.
func big32(v []byte) uint32 {
	if len(v) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(v)
}

// isOurSet reports whether a set is declared as setDeclaration.
func isOurSet(body []byte) bool {
	var flags, typ uint32
	for t, v := range nfAttrs(body) {
		switch t {
		case unix.NFTA_SET_FLAGS:
			flags = big32(v)
		case unix.NFTA_SET_KEY_TYPE:
			typ = big32(v)
		}
	}
	return flags == unix.NFT_SET_INTERVAL && typ == typeIPv4
}

// isOurChain reports whether a chain is declared as chainDeclaration.
func isOurChain(body []byte) bool {
	return isBaseChain(body, "nat", unix.NF_INET_POST_ROUTING, postroutingPriority)
}

// isBaseChain reports whether a chain is declared as a base chain with the policy accept.
func isBaseChain(body []byte, kind string, at uint32, order int32) bool {
	typ, policy, hook, priority := "", uint32(0), ^uint32(0), uint32(0)
	for t, v := range nfAttrs(body) {
		switch t {
		case unix.NFTA_CHAIN_TYPE:
			typ = kernel.Text(v)
		case unix.NFTA_CHAIN_POLICY:
			policy = big32(v)
		case unix.NFTA_CHAIN_HOOK:
			for t, v := range kernel.Attrs(v) {
				switch t {
				case unix.NFTA_HOOK_HOOKNUM:
					hook = big32(v)
				case unix.NFTA_HOOK_PRIORITY:
					priority = big32(v)
				}
			}
		}
	}
	return typ == kind && policy == nfAccept && hook == at && int32(priority) == order
}
