package overlay

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// elementsAtOnce is how many set elements go in one message; an attribute holds 64 KiB.
const elementsAtOnce = 3000

var ownType = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr)

var hooks = map[string]*nftables.ChainHook{
	"prerouting": nftables.ChainHookPrerouting,
	"input":      nftables.ChainHookInput,
	"output":     nftables.ChainHookOutput,
}

// applyGuard fills the set before the rules that refer to it are there, and exchanges chains in one transaction, within
// which there is no moment without them.
func (a *applier) applyGuard(g guardPlan) {
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: Table}
	// Without a number of ours AddSet takes one from a global variable that it does not lock (google/nftables v0.3.0, set.go).
	set := &nftables.Set{Table: table, Name: guardSet, KeyType: nftables.TypeIPAddr, ID: 1}
	dropOld := func(c *nftables.Conn) {
		for _, name := range g.old {
			c.DelChain(&nftables.Chain{Table: table, Name: name})
		}
	}
	if g.replaceSet || g.makeSet {
		a.transact("make nft set "+guardSet, func(c *nftables.Conn) error {
			c.AddTable(table) // also wakes a dormant one
			if g.replaceSet {
				dropOld(c)
				c.DelSet(set)
			}
			return c.AddSet(set, nil)
		})
	}
	a.elements(unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE, g.addPeers)
	if len(g.chains) == 0 {
		return
	}
	a.transact("write nft guard chains", func(c *nftables.Conn) error {
		if !g.replaceSet {
			dropOld(c)
		}
		if err := writeOwn(c, table, g); err != nil {
			return err
		}
		for _, x := range a.guard {
			if slices.ContainsFunc(g.chains, func(c chain) bool { return c.name == x.name }) {
				writeChain(c, table, x)
			}
		}
		return nil
	})
}

func writeChain(c *nftables.Conn, table *nftables.Table, x ruleChain) {
	policy := nftables.ChainPolicyAccept
	nc := c.AddChain(&nftables.Chain{Table: table, Name: x.name, Type: nftables.ChainTypeFilter, Hooknum: hooks[x.hook],
		Priority: nftables.ChainPriorityRef(nftables.ChainPriority(x.priority)), Policy: &policy})
	for _, r := range x.rules {
		c.AddRule(&nftables.Rule{Table: table, Chain: nc, Exprs: r.exprs})
	}
}

// writeOwn exchanges the set of containers' sources.
func writeOwn(c *nftables.Conn, table *nftables.Table, g guardPlan) error {
	set := &nftables.Set{Table: table, Name: ownSet, KeyType: ownType, ID: 2} // (nft itself has no description of a concatenation without intervals)
	if g.dropOwn {
		c.DelSet(set)
	}
	if g.flushOwn {
		c.FlushSet(set)
	}
	if len(g.own) == 0 {
		return nil
	}
	elements := make([]nftables.SetElement, len(g.own))
	for i := range g.own {
		elements[i].Key = g.own[i][:]
	}
	if g.flushOwn {
		return c.SetAddElements(set, elements)
	}
	return c.AddSet(set, elements)
}

func (a *applier) transact(what string, fill func(*nftables.Conn) error) {
	if !a.mayGoOn() {
		return
	}
	c, err := nftables.New(nftables.WithNetNSFd(a.f.ns.FD()))
	if err == nil {
		err = fill(c)
	}
	if err == nil {
		err = c.Flush()
	}
	if err != nil {
		a.again = true
		a.fail(fmt.Errorf("%s in table inet %s: %w", what, Table, err))
		return
	}
	a.changed++
}

// elements adds addresses to the set of peers or deletes them.
func (a *applier) elements(msg uint16, flags int, addrs []netip.Addr) {
	for some := range slices.Chunk(addrs, elementsAtOnce) {
		if !a.mayGoOn() {
			return
		}
		b := nfRequest(msg, flags, Table, guardSet)
		b.Nest(unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_LIST_ELEMENTS, func() {
			for _, x := range some {
				b.Nest(unix.NLA_F_NESTED|unix.NFTA_LIST_ELEM, func() {
					b.Nest(unix.NLA_F_NESTED|unix.NFTA_SET_ELEM_KEY, func() { b.Attr(unix.NFTA_DATA_VALUE, x.AsSlice()) })
				})
			}
		})
		if err := a.f.nf.Transact(b, 0); err != nil {
			a.again = true
			a.fail(fmt.Errorf("change %d elements of nft set %s: %w", len(some), guardSet, err))
			continue
		}
		a.changed += len(some)
	}
}
