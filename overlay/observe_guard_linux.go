package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"code.cloudfoundry.org/silk/internal/kernel"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	nfgenSize = 4
	nfAccept  = 1 // linux/netfilter.h
)

// request returns a batch with one request about table "inet silk": the name of the table and of what is in it.
func nfRequest(msg uint16, flags int, names ...string) *kernel.Batch {
	var b kernel.Batch
	b.Add(kernel.NFTables(msg), flags, kernel.NFGen(unix.NFPROTO_INET))
	for i, n := range names {
		b.String(uint16(i+1), n) // in every nftables message the table is attribute 1 and the object's name attribute 2
	}
	return &b
}

func (f *Fabric) observeGuard(c Config, lower string) (guard, error) {
	var g guard
	err := f.nf.Get(nfRequest(unix.NFT_MSG_GETTABLE, 0, Table), func(m kernel.Message) error {
		g.table = !dormant(m.Body)
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return guard{}, nil
	}
	if err != nil {
		return guard{}, fmt.Errorf("look up nft table inet %s: %w", Table, err)
	}
	err = f.nf.Get(nfRequest(unix.NFT_MSG_GETSET, 0, Table, guardSet), func(m kernel.Message) error {
		g.set = isPeerSet(m.Body)
		g.other = !g.set
		return nil
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return guard{}, fmt.Errorf("look up nft set %s: %w", guardSet, err)
	}
	if g.set {
		if err := f.observePeers(&g); err != nil {
			return guard{}, err
		}
	}
	if err := f.observeOwn(c, &g); err != nil {
		return guard{}, err
	}
	return g, f.observeChains(c, lower, &g)
}

// observeOwn compares the set of containers' sources with what it should be.
func (f *Fabric) observeOwn(c Config, g *guard) error {
	want := pairs(c.Local.Subnet)
	err := f.nf.Get(nfRequest(unix.NFT_MSG_GETSET, 0, Table, ownSet), func(m kernel.Message) error {
		g.ownIs, g.ownFit = true, isOwnSet(m.Body)
		return nil
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("look up nft set %s: %w", ownSet, err)
	}
	if !g.ownIs || !g.ownFit {
		g.own = !g.ownIs && len(want) == 0
		return nil
	}
	var got []pair
	odd := false
	err = f.nf.Dump(nfRequest(unix.NFT_MSG_GETSETELEM, 0, Table, ownSet), func() { got, odd = nil, false }, func(m kernel.Message) error {
		eachKey(m.Body, func(key []byte) {
			if odd = odd || len(key) != len(pair{}); !odd {
				got = append(got, pair(key))
			}
		})
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		g.own, g.ownIs = false, false
		return nil
	}
	if err != nil {
		return fmt.Errorf("list nft set %s: %w", ownSet, err)
	}
	g.own, g.ownFit = !odd && samePairs(got, want), !odd
	return nil
}

// observePeers reads the elements of the set. Something else among them, such as the element that matches everything,
// makes it another set.
func (f *Fabric) observePeers(g *guard) error {
	odd := false
	begin := func() { g.peers, odd = nil, false }
	err := f.nf.Dump(nfRequest(unix.NFT_MSG_GETSETELEM, 0, Table, guardSet), begin, func(m kernel.Message) error {
		return parseElements(m.Body, func(a netip.Addr, ok bool) {
			if odd = odd || !ok; ok {
				g.peers = append(g.peers, a)
			}
		})
	})
	if errors.Is(err, unix.ENOENT) {
		g.peers, g.set = nil, false
		return nil
	}
	if err != nil {
		return fmt.Errorf("list nft set %s: %w", guardSet, err)
	}
	if odd {
		g.peers, g.set, g.other = nil, false, true
	}
	return nil
}

func (f *Fabric) observeChains(c Config, lower string, g *guard) error {
	want := guardRules(c, lower)
	var chains []chain
	err := f.nf.Dump(nfRequest(unix.NFT_MSG_GETCHAIN, 0), func() { chains = nil }, func(m kernel.Message) error {
		table, x, ok := parseChain(m.Body)
		if ok && table == Table && slices.ContainsFunc(want, func(w ruleChain) bool { return w.name == x.name }) {
			chains = append(chains, x)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list nft chains: %w", err)
	}
	for i := range chains {
		j := slices.IndexFunc(want, func(w ruleChain) bool { return w.name == chains[i].name })
		err := f.nf.Dump(nfRequest(unix.NFT_MSG_GETRULE, 0, Table, chains[i].name), func() { chains[i].rules = nil }, func(m kernel.Message) error {
			chains[i].rules = append(chains[i].rules, recognise(m.Body, want[j].rules))
			return nil
		})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("list nft rules of chain %s: %w", chains[i].name, err)
		}
	}
	g.chains = chains
	return nil
}

// dormant reports whether a table is switched off.
func dormant(b []byte) bool {
	for t, v := range nfAttrs(b) {
		if t == unix.NFTA_TABLE_FLAGS && len(v) == 4 {
			return binary.BigEndian.Uint32(v)&unix.NFT_TABLE_F_DORMANT != 0
		}
	}
	return false
}

// isPeerSet reports whether a set is what the guard needs: IPv4 addresses, nothing special, no limit.
func isPeerSet(b []byte) bool {
	flags, typ, size := setKind(b)
	return flags == 0 && size == 0 && typ == nftables.TypeIPAddr.GetNFTMagic()
}

// isOwnSet reports whether a set has devices and addresses, nothing special, no limit.
func isOwnSet(b []byte) bool {
	flags, typ, size := setKind(b)
	return flags == 0 && size == 0 && typ == ownType.GetNFTMagic()
}

func setKind(b []byte) (flags, typ, size uint32) {
	for t, v := range nfAttrs(b) {
		switch {
		case t == unix.NFTA_SET_DESC:
			for t, v := range kernel.Attrs(v) {
				if t == unix.NFTA_SET_DESC_SIZE && len(v) == 4 {
					size = binary.BigEndian.Uint32(v)
				}
			}
		case len(v) != 4:
		case t == unix.NFTA_SET_FLAGS:
			flags = binary.BigEndian.Uint32(v)
		case t == unix.NFTA_SET_KEY_TYPE:
			typ = binary.BigEndian.Uint32(v)
		}
	}
	return flags, typ, size
}

// nfAttrs yields the attributes of an nftables message.
func nfAttrs(b []byte) func(func(uint16, []byte) bool) {
	return kernel.Attrs(b[min(nfgenSize, len(b)):])
}

// parseElements calls each for every element in a message: its address, or false if its key is none.
func parseElements(b []byte, each func(netip.Addr, bool)) error {
	eachKey(b, func(key []byte) {
		var a netip.Addr
		if len(key) == 4 {
			a = netip.AddrFrom4([4]byte(key))
		}
		each(a, a.IsValid())
	})
	return nil
}

// eachKey calls each with the key of every element in a message, nil for one that has none.
func eachKey(b []byte, each func([]byte)) {
	for t, list := range nfAttrs(b) {
		if t != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			continue
		}
		for _, elem := range kernel.Attrs(list) {
			var key []byte
			for t, v := range kernel.Attrs(elem) {
				if t != unix.NFTA_SET_ELEM_KEY {
					continue
				}
				for t, v := range kernel.Attrs(v) {
					if t == unix.NFTA_DATA_VALUE {
						key = v
					}
				}
			}
			each(key)
		}
	}
}

// parseChain reads a chain of family inet: its table and its declaration.
func parseChain(b []byte) (table string, c chain, ok bool) {
	if len(b) < nfgenSize || b[0] != unix.NFPROTO_INET {
		return "", chain{}, false
	}
	hooks := [...]string{
		unix.NF_INET_PRE_ROUTING: "prerouting", unix.NF_INET_LOCAL_IN: "input", unix.NF_INET_FORWARD: "forward",
		unix.NF_INET_LOCAL_OUT: "output", unix.NF_INET_POST_ROUTING: "postrouting",
	}
	var typ, hook string
	var priority int32
	policy := "drop"
	for t, v := range nfAttrs(b) {
		switch t {
		case unix.NFTA_CHAIN_TABLE:
			table = kernel.Text(v)
		case unix.NFTA_CHAIN_NAME:
			c.name = kernel.Text(v)
		case unix.NFTA_CHAIN_TYPE:
			typ = kernel.Text(v)
		case unix.NFTA_CHAIN_POLICY:
			if len(v) == 4 && binary.BigEndian.Uint32(v) == nfAccept {
				policy = "accept"
			}
		case unix.NFTA_CHAIN_HOOK:
			for t, v := range kernel.Attrs(v) {
				switch {
				case len(v) != 4:
				case t == unix.NFTA_HOOK_HOOKNUM:
					if n := binary.BigEndian.Uint32(v); n < uint32(len(hooks)) {
						hook = hooks[n]
					}
				case t == unix.NFTA_HOOK_PRIORITY:
					priority = int32(binary.BigEndian.Uint32(v))
				}
			}
		}
	}
	if typ != "" {
		c.hook = hookText(typ, hook, priority, policy)
	}
	return table, c, c.name != ""
}

// unknownRule stands for a rule that is none of ours.
const unknownRule = "(another rule)"

// recognise returns the text of the rule among want that a message describes, whatever its counters say.
func recognise(b []byte, want []rule) string {
	exprs, ok := parseRule(b)
	if ok {
		for _, r := range want {
			if reflect.DeepEqual(exprs, r.exprs) {
				return r.text
			}
		}
	}
	return unknownRule
}

// parseRule reads the expressions of a rule, with counters at zero. Not ok: there is one of a kind that we never use.
func parseRule(b []byte) (exprs []expr.Any, ok bool) {
	for t, list := range nfAttrs(b) {
		if t != unix.NFTA_RULE_EXPRESSIONS {
			continue
		}
		for _, item := range kernel.Attrs(list) {
			e, ok := parseExpr(item)
			if !ok {
				return nil, false
			}
			exprs = append(exprs, e)
		}
	}
	return exprs, true
}

func parseExpr(b []byte) (expr.Any, bool) {
	var e expr.Any
	for t, v := range kernel.Attrs(b) {
		switch t {
		case unix.NFTA_EXPR_NAME:
			switch kernel.Text(v) {
			case "meta":
				e = &expr.Meta{}
			case "cmp":
				e = &expr.Cmp{}
			case "payload":
				e = &expr.Payload{}
			case "bitwise":
				e = &expr.Bitwise{}
			case "fib":
				e = &expr.Fib{}
			case "lookup":
				e = &expr.Lookup{}
			case "counter":
				return &expr.Counter{}, true
			case "notrack":
				return &expr.Notrack{}, true
			case "immediate":
				e = &expr.Verdict{}
			default:
				return nil, false
			}
		case unix.NFTA_EXPR_DATA:
			if e == nil || expr.Unmarshal(unix.NFPROTO_INET, v, e) != nil {
				return nil, false
			}
		}
	}
	return e, e != nil
}
