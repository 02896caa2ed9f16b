package nat

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// MapPorts makes the maps' ports of the host, in the calling thread's namespace, lead where they say. Many may do so at once, beside Set and
// SetPorts. The chains and maps that this takes are made when they are missing. Afterwards the kernel knows no connection of UDP
// any more that began at one of the ports before.
//
// fault.Conflict: one of the ports leads to another address, which live says belongs to somebody; one that is nobody's is replaced. Then nothing has
// been changed. Invalid: a map that can never be.
func MapPorts(ctx context.Context, maps []PortMap, live func(netip.Addr) (bool, error)) error {
	for _, m := range maps {
		if !m.valid() {
			return fault.Invalidf("port map %v: expected a port of tcp, udp or sctp, and IPv4", m)
		}
	}
	conn, err := kernel.DialNetfilter(nil)
	if err != nil {
		return err
	}
	defer conn.Close()
	want := elements(maps)
	err = retry(ctx, func() error {
		found, whole, err := ask(conn, want)
		if err != nil {
			return err
		}
		if !whole {
			return build(conn, want)
		}
		b, err := planElements(want, found, live)
		if err != nil {
			return err
		}
		return conn.Transact(b, 0)
	})
	if err != nil {
		return fmt.Errorf("map ports: %w", err)
	}
	return forgetUDP(maps)
}

// UnmapPorts takes the maps' ports back, in the calling thread's namespace, of those that still lead where they say. What is gone already is no error.
//
// To close the socket waits some 10 ms for the kernel to have let go of what was taken back. That is what wait does, which is never nil, is to be called once
// and may be called by another goroutine: there may be something else to wait for.
func UnmapPorts(ctx context.Context, maps []PortMap) (wait func(), err error) {
	conn, err := kernel.DialNetfilter(nil)
	if err != nil {
		return func() {}, err
	}
	wait = func() { conn.Close() }
	doomed := elements(maps)
	err = retry(ctx, func() error {
		found, _, err := ask(conn, doomed)
		if err != nil {
			return err
		}
		var b kernel.Batch
		for i, e := range doomed {
			if found[i] != nil && found[i].data == e.data {
				deleteElement(&b, e)
			}
		}
		return conn.Transact(&b, 0)
	})
	if err != nil {
		return wait, fmt.Errorf("take port maps back: %w", err)
	}
	return wait, nil
}

// UnmapAddress takes back, in the calling thread's namespace, every port that leads to a container's address.
func UnmapAddress(ctx context.Context, a netip.Addr) error {
	_, err := SetPorts(ctx, func(have []PortMap, _ bool) ([]PortMap, func(), error) {
		return slices.DeleteFunc(have, func(m PortMap) bool { return m.To.Addr() == a }), func() {}, nil
	})
	return err
}

// MissingPorts returns which of the maps the kernel does not have in the calling thread's namespace, and whether all else that they depend on is there.
func MissingPorts(maps []PortMap) (missing []PortMap, whole bool, err error) {
	conn, err := kernel.DialNetfilter(nil)
	if err != nil {
		return nil, false, err
	}
	defer conn.Close()
	s, err := observePorts(conn)
	if err != nil {
		return nil, false, err
	}
	for _, m := range maps {
		for _, e := range elements([]PortMap{m}) {
			if !slices.Contains(s.elements, e) {
				missing = append(missing, m)
				break
			}
		}
	}
	return missing, s.whole, nil
}

// retry repeats an attempt that lost a race.
func retry(ctx context.Context, attempt func() error) error {
	var err error
	for range attempts {
		if err = ctx.Err(); err != nil {
			return err
		}
		err = attempt()
		if !errors.Is(err, kernel.ErrGeneration) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return fault.Unavailablef("nftables changed each of %d times: %w", attempts, err)
}

// ask looks for elements, by one question, and for the chains. found has one for each wanted that has its key, which may lead elsewhere. whole tells
// that the chains are there and have as many rules as they should: it is somebody else's to look at the rules.
func ask(c *kernel.Conn, want []element) (found []*element, whole bool, err error) {
	chains, answers, err := withChains(c, func(b *kernel.Batch) {
		for _, e := range want {
			request(b, unix.NFT_MSG_GETSETELEM, 0, Table, e.set)
			listElements(b, []element{{set: e.set, key: e.key}})
		}
	})
	if err != nil {
		return nil, false, err
	}
	whole = true
	for i, x := range chains {
		whole = whole && answers[i].Err == nil && x.is(answers[i].Body) && chainUse(answers[i].Body) == x.used
	}
	found = make([]*element, len(want))
	for i, e := range want {
		if a := answers[len(chains)+i]; a.Err == nil {
			for _, f := range parsePortElements(a.Body, e.set) {
				found[i] = &f
			}
		}
	}
	return found, whole, nil
}

// withChains asks for the chains of port maps, and what more adds, by one question. What is not there has ENOENT for an answer.
func withChains(c *kernel.Conn, more func(*kernel.Batch)) ([]portChain, []kernel.Answer, error) {
	var b kernel.Batch
	chains := portChains()
	for _, x := range chains {
		requestChainOf(&b, unix.NFT_MSG_GETCHAIN, 0, x.name)
	}
	more(&b)
	answers, err := c.Query(&b)
	if err != nil {
		return nil, nil, err
	}
	for _, a := range answers {
		if a.Err != nil && a.Err.Errno != unix.ENOENT {
			return nil, nil, fmt.Errorf("look up port maps: %w", a.Err)
		}
	}
	return chains, answers, nil
}

// planElements returns the requests that bring the wanted elements about, none of which may take away what is somebody's.
func planElements(want []element, found []*element, live func(netip.Addr) (bool, error)) (*kernel.Batch, error) {
	b := new(kernel.Batch)
	for i, e := range want {
		f := found[i]
		if f != nil && f.data == e.data {
			continue
		}
		if f != nil {
			m, _ := e.portMap()
			taken := true
			var err error
			if f.target() != m.To.Addr() {
				taken, err = live(f.target())
			}
			if err != nil {
				return nil, err
			}
			if taken {
				return nil, fault.Conflictf("host port %s of %v leads to %v", ProtocolName(m.Protocol), m.Host, f.target())
			}
			deleteElement(b, e)
		}
		addPortElements(b, []element{e}, unix.NLM_F_EXCL)
	}
	return b, nil
}

// portState is what the kernel has of port maps.
type portState struct {
	generation uint32
	whole      bool      // nothing but elements can be missing
	elements   []element // sorted
	chains     []string  // that are there, right or not
	sets       []string
}

// observePorts reads all of it.
func observePorts(c *kernel.Conn) (portState, error) {
	gen, err := c.Generation()
	if err != nil {
		return portState{}, err
	}
	s := portState{generation: gen, whole: true}
	chains, answers, err := withChains(c, func(b *kernel.Batch) {
		for _, x := range portSets {
			request(b, unix.NFT_MSG_GETSET, 0, Table, x.name)
		}
	})
	if err != nil {
		return s, err
	}
	for i, x := range chains {
		if answers[i].Err != nil {
			s.whole = false
			continue
		}
		s.chains = append(s.chains, x.name)
		right, err := x.hasRules(c)
		if err != nil {
			return s, err
		}
		s.whole = s.whole && right && x.is(answers[i].Body)
	}
	for i, x := range portSets {
		a := answers[len(chains)+i]
		if a.Err != nil {
			s.whole = false
			continue
		}
		s.sets = append(s.sets, x.name)
		if !x.is(a.Body) {
			s.whole = false
			continue
		}
		list, err := observePortElements(c, x.name)
		if err != nil {
			return s, err
		}
		s.elements = append(s.elements, list...)
	}
	s.elements = sorted(s.elements)
	return s, nil
}

// build makes chains and sets anew, in one transaction, and puts in the elements that were there and those wanted. Of two that
// have the same key the wanted one counts.
func build(c *kernel.Conn, want []element) error {
	s, err := observePorts(c)
	if err != nil {
		return err
	}
	return c.Transact(planFrame(s, join(s.elements, want)), s.generation)
}

// join returns the elements of both lists; of two with the same key that of the second.
func join(have, more []element) []element {
	out := slices.Clone(more)
	for _, e := range have {
		if !slices.ContainsFunc(more, func(o element) bool { return o.set == e.set && o.key == e.key }) {
			out = append(out, e)
		}
	}
	return sorted(out)
}

// planFrame returns the requests that replace all that there is.
func planFrame(s portState, want []element) *kernel.Batch {
	b := new(kernel.Batch)
	request(b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, Table)
	addSetFlags(b, setLocal, unix.NLM_F_CREATE) // which the rules look into; what is to be in it is Set's
	planGone(b, s)
	for _, x := range portSets {
		x.add(b)
	}
	for _, x := range portChains() {
		x.add(b)
	}
	addPortElements(b, want, 0)
	return b
}

// planGone returns the requests that take all away.
func planGone(b *kernel.Batch, s portState) {
	for _, n := range s.chains {
		request(b, unix.NFT_MSG_DELRULE, 0, Table, n)
	}
	for _, n := range slices.Backward(s.chains) {
		requestChainOf(b, unix.NFT_MSG_DELCHAIN, 0, n)
	}
	for _, n := range s.sets {
		request(b, unix.NFT_MSG_DELSET, 0, Table, n)
	}
}

// SetPorts makes the port maps in the calling thread's namespace those that decide wants, and returns how many it made or took away. decide gets those that are there,
// and whether something else has to be made again, and returns what is wanted and what is to be called when the kernel has it or will not
// have it. It is called again when nftables changed meanwhile. With none there and none wanted nothing is made.
func SetPorts(ctx context.Context, decide func(have []PortMap, whole bool) (want []PortMap, done func(), err error)) (changed int, err error) {
	conn, err := kernel.DialNetfilter(nil)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	err = retry(ctx, func() error {
		s, err := observePorts(conn)
		if err != nil {
			return err
		}
		var have []PortMap
		for _, e := range s.elements {
			if m, ok := e.portMap(); ok {
				have = append(have, m)
			}
		}
		want, done, err := decide(have, s.whole)
		if err != nil {
			return err
		}
		defer done()
		var b *kernel.Batch
		b, changed = planPorts(s, elements(want))
		return conn.Transact(b, s.generation)
	})
	if err != nil {
		return 0, fmt.Errorf("set port maps: %w", err)
	}
	return changed, nil
}

// planPorts returns the requests that lead from s to the wanted elements and how many elements they are about.
func planPorts(s portState, want []element) (b *kernel.Batch, changed int) {
	if !s.whole {
		if len(want) == 0 && len(s.chains)+len(s.sets) == 0 {
			return new(kernel.Batch), 0
		}
		return planFrame(s, want), max(len(want), 1)
	}
	b = new(kernel.Batch)
	for _, e := range s.elements {
		if !slices.Contains(want, e) {
			deleteElement(b, e)
			changed++
		}
	}
	var missing []element
	for _, e := range want {
		if !slices.Contains(s.elements, e) {
			missing = append(missing, e)
		}
	}
	addPortElements(b, missing, 0)
	return b, changed + len(missing)
}

// removePorts takes everything away.
func removePorts(ctx context.Context, c *kernel.Conn) error {
	return retry(ctx, func() error {
		s, err := observePorts(c)
		if err != nil {
			return err
		}
		b := new(kernel.Batch)
		planGone(b, s)
		return c.Transact(b, s.generation)
	})
}
