package nft

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Check looks at what else is on the host and changes nothing. Conflict: an ip rule decides by bits of the mark that carry tags. The strings
// are warnings: others' rules that drop forwarded packets, and with them the containers', and what to do about it.
func (t *Table) Check(ctx context.Context) ([]string, error) {
	rt, err := kernel.Dial(t.ns)
	if err != nil {
		return nil, err
	}
	defer rt.Close()
	rules, err := rt.MarkRules(tagMask)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, r := range rules {
		errs = append(errs, fault.Conflictf("ip rule %v decides by bits of the packet mark that carry tags (0x%08x): remove it or give it other bits", r, tagMask))
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	warnings, err := foreignDrops(t.nf)
	errs = append(errs, err)
	err = t.ns.Do(func() error {
		f, err := kernel.LegacyForwarding()
		if err == nil && f.Drops && !slices.Contains(f.Devices, "s-+") {
			warnings = append(warnings, "policy of chain FORWARD of iptables-legacy is DROP, for containers' packets too: "+
				"iptables-legacy -I FORWARD -i s-+ -j ACCEPT; iptables-legacy -I FORWARD -o s-+ -j ACCEPT")
		}
		return err
	})
	return warnings, errors.Join(append(errs, err)...)
}

// foreignChain is a chain of others.
type foreignChain struct {
	family       uint8
	table, name  string
	forward      bool
	drops        bool // by its policy
	lastRefuses  bool // its last rule drops or rejects everything
	acceptsS     bool // a rule of it accepts what comes from container devices, or has a chain of its own for it
	isDockerUser bool
}

// foreignDrops returns a warning for every base chain in the way of forwarded packets that ends with a refusal, unless its table
// accepts what comes from containers' devices somewhere.
func foreignDrops(c *kernel.Conn) ([]string, error) {
	var chains []*foreignChain
	if err := dumpAll(c, unix.NFT_MSG_GETCHAIN, func() { chains = nil }, func(b []byte) {
		if x, ok := parseForeignChain(b); ok {
			chains = append(chains, &x)
		}
	}); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(chains, func(x *foreignChain) bool { return x.forward }) {
		return nil, nil
	}
	if err := dumpAll(c, unix.NFT_MSG_GETRULE, func() {}, func(b []byte) { parseForeignRule(b, chains) }); err != nil {
		return nil, err
	}
	var out []string
	for _, x := range chains {
		accepted := slices.ContainsFunc(chains, func(y *foreignChain) bool { return y.family == x.family && y.table == x.table && y.acceptsS })
		if x.forward && (x.drops || x.lastRefuses) && !accepted {
			out = append(out, x.warning(chains))
		}
	}
	return out, nil
}

// warning says what is wrong and how it is mended, in the words of the tool that the chain is likely to be from.
func (x *foreignChain) warning(all []*foreignChain) string {
	family := map[uint8]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_INET: "inet"}[x.family]
	text := fmt.Sprintf("chain %.40q of nft table %s %.40q refuses what it does not know, containers' packets too: ", x.name, family, x.table)
	if family == "ip" && x.table == "filter" {
		chain := x.name
		if slices.ContainsFunc(all, func(y *foreignChain) bool { return y.isDockerUser && y.table == x.table && y.family == x.family }) {
			chain = "DOCKER-USER"
		}
		return text + fmt.Sprintf("iptables -I %.40s -i s-+ -j ACCEPT; iptables -I %.40s -o s-+ -j ACCEPT", chain, chain)
	}
	if x.table == "firewalld" {
		return text + "firewall-cmd --permanent --zone=trusted --add-interface=s-+; firewall-cmd --reload"
	}
	return text + fmt.Sprintf("insert rules that accept iifname \"s-*\" and oifname \"s-*\" into %.40q", x.name)
}

// dumpAll lists objects of all tables.
func dumpAll(c *kernel.Conn, msg uint16, begin func(), each func(body []byte)) error {
	var b kernel.Batch
	b.Add(kernel.NFTables(msg), 0, kernel.NFGen(unix.AF_UNSPEC))
	if err := c.Dump(&b, begin, func(m kernel.Message) error { each(m.Body); return nil }); err != nil {
		return fmt.Errorf("list nft rules of others: %w", err)
	}
	return nil
}

// parseForeignChain reads a chain that IPv4 packets may go through and that is not ours.
func parseForeignChain(body []byte) (x foreignChain, ok bool) {
	if len(body) < 4 || body[0] != unix.NFPROTO_IPV4 && body[0] != unix.NFPROTO_INET {
		return x, false
	}
	x.family = body[0]
	for t, v := range nfAttrs(body) {
		switch t {
		case unix.NFTA_CHAIN_TABLE:
			x.table = kernel.Text(v)
		case unix.NFTA_CHAIN_NAME:
			x.name = kernel.Text(v)
		case unix.NFTA_CHAIN_POLICY:
			x.drops = len(v) == 4 && number(v) != nfAccept
		case unix.NFTA_CHAIN_HOOK:
			for t, v := range kernel.Attrs(v) {
				x.forward = x.forward || t == unix.NFTA_HOOK_HOOKNUM && len(v) == 4 && number(v) == unix.NF_INET_FORWARD
			}
		}
	}
	x.isDockerUser = x.name == "DOCKER-USER"
	return x, x.table != Name || x.family != unix.NFPROTO_INET
}

// parseForeignRule notes what a rule does in the chain that it is of.
func parseForeignRule(body []byte, chains []*foreignChain) {
	if len(body) < 4 {
		return
	}
	var table, name string
	var exprs []byte
	for t, v := range nfAttrs(body) {
		switch t {
		case unix.NFTA_RULE_TABLE:
			table = kernel.Text(v)
		case unix.NFTA_RULE_CHAIN:
			name = kernel.Text(v)
		case unix.NFTA_RULE_EXPRESSIONS:
			exprs = v
		}
	}
	i := slices.IndexFunc(chains, func(x *foreignChain) bool { return x.family == body[0] && x.table == table && x.name == name })
	if i < 0 {
		return
	}
	matches, refuses, accepts, ours := false, false, false, false
	for _, item := range kernel.Attrs(exprs) {
		what, data := "", []byte(nil)
		for t, v := range kernel.Attrs(item) {
			switch t {
			case unix.NFTA_EXPR_NAME:
				what = kernel.Text(v)
			case unix.NFTA_EXPR_DATA:
				data = v
			}
		}
		switch what {
		case "counter", "log":
		case "reject":
			refuses = true
		case "immediate":
			text := attributes(what, data, 0)
			chain := fmt.Sprintf(" %d=", unix.NFTA_VERDICT_CHAIN) // of others' zones: what is sent there on purpose is taken for accepted
			accepts = strings.Contains(text, verdictText(nfAccept)) || strings.Contains(text, chain)
			refuses = refuses || strings.Contains(text, verdictText(0))
		case "cmp":
			matches, ours = true, ours || bytes.Contains(data, []byte("s-"))
		default:
			matches = true
		}
	}
	chains[i].lastRefuses = refuses && !matches
	chains[i].acceptsS = chains[i].acceptsS || accepts && ours
}

// verdictText is what attributes makes of a verdict without a chain.
func verdictText(code uint32) string {
	return fmt.Sprintf("%d=%x]", unix.NFTA_VERDICT_CODE, big32(code))
}
