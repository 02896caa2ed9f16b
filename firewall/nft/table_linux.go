package nft

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"strings"
	"sync"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Table is the table of one network namespace. Its methods are safe for concurrent use; Set, Plan and Cut take turns. There
// can be one Table for a namespace.
//
// A Set looks at everything unless it can know that nothing was touched: the table is owned, or the kernel, which tells the Table of every
// change to nftables, has told of none to this table since.
type Table struct {
	ns       *kernel.NS
	ownsNS   bool
	connMask uint32
	logGroup uint16

	mu    sync.Mutex
	nf    *kernel.Conn
	port  uint32
	heard *ear
	owned bool // what this kernel can
	build builder
	known *state            // what the last Set left; nil: the kernel must be looked at
	last  *wish             // of the last Set
	rules *firewall.Ruleset // of the last Set
	ends  bool              // Cut is about to need the rule for what it ended
}

// attempts bounds how often Set starts over because somebody else changed nftables in between. The first few are tied to nftables' generation, which others may
// change all the time in tables of their own; the rest are not, and it is looked afterwards whether somebody was at this one meanwhile.
const attempts, tied = 8, 3

// Open adopts the table in ns, nil for the calling thread's namespace, or makes it with nothing allowed: then nothing new
// passes to or from a container until the first Set. Conflict: another process owns it. ns must stay open until Close.
func Open(ns *kernel.NS, o Options) (*Table, error) {
	o.ConnMask = cmp.Or(o.ConnMask, tagMask)
	if bits.OnesCount32(o.ConnMask) != 16 || o.ConnMask>>bits.TrailingZeros32(o.ConnMask) != tagMask {
		return nil, fault.Invalidf("mask 0x%08x for marks of connections: expected 16 bits in a row, such as 0x0000ffff", o.ConnMask)
	}
	t := &Table{ns: ns, connMask: o.ConnMask, logGroup: cmp.Or(o.LogGroup, LogGroup), owned: !o.Unowned}
	err := t.open()
	if err == nil {
		err = t.base()
	}
	if err != nil {
		t.Close()
		return nil, err
	}
	return t, nil
}

func (t *Table) open() (err error) {
	if t.ns == nil {
		if t.ns, err = kernel.CurrentNS(); err != nil {
			return err
		}
		t.ownsNS = true
	}
	if t.nf, err = kernel.DialNetfilter(t.ns); err != nil {
		return err
	}
	if t.port, err = t.nf.Port(); err != nil {
		return err
	}
	t.heard, err = listen(t.ns, t.port)
	return err
}

// Close lets go of the table, which goes on enforcing what was set. No other method may be running or be called later.
func (t *Table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	if t.heard != nil {
		errs = append(errs, t.heard.Close())
	}
	if t.nf != nil {
		errs = append(errs, t.nf.Close())
	}
	if t.ownsNS {
		errs = append(errs, t.ns.Close())
	}
	return errors.Join(errs...)
}

// Stand sees to it that there is a table that judges, whatever is in it, for a caller that does not know yet what it is to be: one that somebody has
// taken away since Open, or emptied, is made anew with nothing allowed.
func (t *Table) Stand(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := ctx.Err(); err != nil || t.untouched() {
		return err
	}
	t.known = nil
	return t.base()
}

// base adopts the table if it judges what passes. Otherwise it makes one that lets nothing new through, which does not depend on what the first
// Set will say.
func (t *Table) base() error {
	if t.owned {
		e := encoder{table: Name, flags: t.flags()}
		e.makeTable()
		err := t.nf.Transact(&e.b, 0)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EBUSY) {
			return fault.Conflictf("nft table inet %s belongs to another process: stop the other vxlan-policy-agent first: %w", Name, err)
		}
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
			t.owned = t.ownable()
		} else if err != nil {
			return fmt.Errorf("make nft table inet %s: %w", Name, err)
		}
	}
	s, err := t.observe()
	if err != nil {
		return err
	}
	defer remove(t.nf, standIn) // of a process that was killed
	// A chain that begins as ours and has rules was ours, if of another version. One that was flushed lets everything through.
	if s.odd == "" && strings.HasPrefix(s.chains[chainForward], forward.String()+"\n") && strings.HasPrefix(s.chains[chainInput], input.String()+"\n") {
		return nil
	}
	f := frame{network: netip.PrefixFrom(netip.IPv4Unspecified(), 0), vtep: defaultVTEP, connMask: t.connMask, log: logsOf(firewall.Log{}, t.logGroup)}
	return t.send(plan(t.build.wish(f, &firewall.Ruleset{}, nil), s, t.owned), 0)
}

// defaultVTEP is in the rules until the first Set says another. It only tells reasons of refusal apart there.
const defaultVTEP = "silk-vtep"

// ownable reports whether this kernel knows owners of tables that outlive them (6.9). A table that exists without an owner
// cannot be given one, which is refused just as on a kernel that does not know any.
func (t *Table) ownable() bool {
	const probe = Name + "-probe"
	var b kernel.Batch
	request(&b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, probe)
	b.Attr(unix.NFTA_TABLE_FLAGS, big32(tableOwner|tablePersist))
	request(&b, unix.NFT_MSG_DELTABLE, 0, probe)
	return t.nf.Transact(&b, 0) == nil
}

func (t *Table) frame(rs *firewall.Ruleset) (frame, error) {
	if !rs.Network.IsValid() || !rs.Network.Addr().Is4() {
		return frame{}, fault.Invalidf("overlay network %v: expected an IPv4 network such as 10.255.0.0/16", rs.Network)
	}
	if rs.VTEP == "" || len(rs.VTEP) >= unix.IFNAMSIZ || strings.ContainsAny(rs.VTEP, "\"*\\\n") {
		return frame{}, fault.Invalidf("VXLAN device %.40q: expected a device name such as silk-vtep", rs.VTEP)
	}
	return frame{network: rs.Network, vtep: rs.VTEP, unrestricted: rs.Unrestricted, router: rs.Router, connMask: t.connMask, limit: rs.Limit, log: logsOf(rs.Log, t.logGroup)}, nil
}

// Set makes the kernel enforce rs, which must not change afterwards. What takes effect does so in one transaction.
func (t *Table) Set(ctx context.Context, rs firewall.Ruleset) (Changes, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	c, err := t.converge(ctx, &rs)
	if err == nil {
		t.rules = &rs
	}
	return c, err
}

// converge tries until nobody else comes in between.
func (t *Table) converge(ctx context.Context, rs *firewall.Ruleset) (Changes, error) {
	f, err := t.frame(rs)
	if err != nil {
		return Changes{}, err
	}
	for i := range attempts {
		if err := ctx.Err(); err != nil {
			return Changes{}, err
		}
		var c Changes
		if c, err = t.set(f, rs, i < tied); err == nil {
			return c, nil
		}
		t.known = nil
		if !errors.Is(err, kernel.ErrGeneration) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EBUSY) {
			return c, err
		}
	}
	return Changes{}, fault.Unavailablef("write nft table inet %s: nftables changed each of %d times: %w", Name, attempts, err)
}

func (t *Table) set(f frame, rs *firewall.Ruleset, tied bool) (Changes, error) {
	s, generation, err := t.look()
	if err != nil {
		return Changes{}, err
	}
	if !tied {
		generation = 0
	}
	f.ended = s.ended || t.ends
	w := t.build.wish(f, rs, s.sets)
	c := Changes{Full: s != t.known, Desired: w.elements(), Observed: s.elements()}
	if c.Full && t.last != nil {
		c.Drift = len(plan(t.last, s, t.owned))
	}
	first, then := stages(plan(w, s, t.owned))
	for _, changes := range append(first, then) {
		if len(changes) == 0 {
			continue
		}
		t.known = nil
		if err := t.send(changes, generation); err != nil {
			return c, err
		}
		c.Sent += len(changes)
		generation = next(generation)
	}
	if !tied && !t.owned && !t.untouched() {
		return c, kernel.ErrGeneration
	}
	t.known, t.last, t.ends = stateOf(w, t.owned), w, false
	return c, nil
}

// look returns the state of the table and, unless it is owned, the generation of nftables that it belongs to.
func (t *Table) look() (s *state, generation uint32, err error) {
	if t.owned && t.known != nil {
		return t.known, 0, nil
	}
	if !t.owned {
		if generation, err = t.nf.Generation(); err != nil {
			return nil, 0, err
		}
	}
	if untouched := t.untouched(); untouched && t.known != nil {
		return t.known, generation, nil
	}
	s, err = t.observe()
	return s, generation, err
}

// observe reads the whole table, again if somebody touched it while that went on among changes to others.
func (t *Table) observe() (*state, error) {
	for range attempts {
		t.untouched() // what was heard so far is in it
		s, err := observe(t.ns, t.nf, t.owned, t.heard.hear)
		if err != nil || !s.doubtful || s.owned || t.untouched() {
			return s, err
		}
	}
	return nil, fmt.Errorf("list nft table inet %s: %w", Name, kernel.ErrDumpInterrupted)
}

// untouched reports whether nobody else has changed the table since it was last asked.
func (t *Table) untouched() bool { return !t.heard.touched() }

// send carries out changes in one transaction. With a generation other than 0 it does so only if nftables is still at it.
func (t *Table) send(changes []change, generation uint32) error {
	if len(changes) == 0 {
		return nil
	}
	if changes[0].verb == "delete" && changes[0].object == "table" {
		if err := remove(t.nf, standIn); err != nil { // one that could not be removed the last time
			return err
		}
		if err := t.write(encoder{table: standIn, flags: t.flags() &^ tablePersist}, changes[1:], generation); err != nil {
			return err
		}
		kernel.Settle() // packets underway know only the old table
		defer func() {
			kernel.Settle() // likewise of the new one
			remove(t.nf, standIn)
		}()
		generation = next(generation)
	}
	return t.write(encoder{table: Name, flags: t.flags()}, changes, generation)
}

// standIn is a second table that judges while the first one is deleted and made again. That is one transaction, but a packet on its way through a hook does
// not see it as one: it may pass the new chain, which is first, before the transaction holds, when it has no rules yet, and the old one afterwards, when it
// has none any more (nft_do_chain asks for the generation in each chain).
const standIn = Name + "-standin"

// flags are those of a table that is made.
func (t *Table) flags() uint32 {
	if t.owned {
		return tableOwner | tablePersist
	}
	return 0
}

// next returns the generation that follows a transaction; 0, which is passed over, stands for any.
func next(generation uint32) uint32 {
	if generation == 0 {
		return 0
	}
	return max(generation+1, 1)
}

// write carries out changes of the encoder's table.
func (t *Table) write(e encoder, changes []change, generation uint32) error {
	e.encode(changes)
	err := t.nf.Transact(&e.b, generation)
	if r, ok := errors.AsType[*kernel.RequestError](err); ok && r.Index >= 0 && r.Index < len(e.of) {
		return fmt.Errorf("nft %.200s: %w", changes[e.of[r.Index]].String(), err)
	}
	if err != nil {
		return fmt.Errorf("write nft table inet %s: %w", Name, err)
	}
	return nil
}

// Plan returns what a Set that looks at everything would do, as nft commands, and changes nothing.
func (t *Table) Plan(ctx context.Context, rs firewall.Ruleset) ([]string, error) {
	f, err := t.frame(&rs)
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s, err := t.observe()
	if err != nil {
		return nil, err
	}
	var lines []string
	f.ended = s.ended
	for _, c := range plan(t.build.wish(f, &rs, s.sets), s, t.owned) {
		lines = append(lines, c.String())
	}
	return lines, nil
}

// Forget makes the next Set look at everything. A caller does so at long intervals, in case that something changes
// without the kernel telling.
func (t *Table) Forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.known = nil
}

// Held reports whether a process has the table in ns, nil for the calling thread's namespace, for its own: an agent that runs. On kernels where
// tables have no owners it is false.
func Held(ns *kernel.NS) (bool, error) {
	c, err := kernel.DialNetfilter(ns)
	if err != nil {
		return false, err
	}
	defer c.Close()
	var b kernel.Batch
	request(&b, unix.NFT_MSG_GETTABLE, 0, Name)
	held := false
	err = c.Get(&b, func(m kernel.Message) error {
		for t, v := range nfAttrs(m.Body) {
			held = held || t == unix.NFTA_TABLE_FLAGS && number(v)&tableOwner != 0
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up nft table inet %s: %w", Name, err)
	}
	return held, nil
}

// Remove deletes the table in ns, nil for the calling thread's namespace. Conflict: another process owns it. One that is not there is no error.
func Remove(ns *kernel.NS) error {
	c, err := kernel.DialNetfilter(ns)
	if err != nil {
		return err
	}
	defer c.Close()
	err = errors.Join(remove(c, standIn), remove(c, Name))
	if errors.Is(err, unix.EPERM) {
		return fault.Conflictf("nft table inet %s belongs to a process that runs: stop vxlan-policy-agent first: %w", Name, err)
	}
	return err
}

// remove deletes a table. One that is not there is no error.
func remove(c *kernel.Conn, table string) error {
	var b kernel.Batch
	request(&b, unix.NFT_MSG_DELTABLE, 0, table)
	if err := c.Transact(&b, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete nft table inet %s: %w", table, err)
	}
	return nil
}
