// Package nat owns the address translations of a host, in the nft table "inet silk": containers' traffic to
// anything outside the overlay leaves with the host's address.
//
// It is one static rule and two sets, whatever the number of containers. The table belongs to several rooms (overlay
// guards the VXLAN port there), so it is never flushed: this package touches only the chain and the sets it names.
// It does not filter (firewall).
//
// Use: Set brings the kernel to a Config and may be called any number of times; Explain says what Set would do;
// Remove takes everything away.
package nat

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Table is the nft table, of family inet, that Silk's connectivity rules share.
const Table = "silk"

// What is ours in the table. The names of objects of later kinds of translation begin alike.
const (
	chainName       = "nat-postrouting"
	setLocal        = "nat-local"
	setNoMasquerade = "nat-no-masquerade"
)

// Config says which traffic leaves with the host's address. It is a plain value. The order of prefixes means nothing and
// they may overlap.
type Config struct {
	Local        []netip.Prefix // the host's overlay subnets: traffic from them to others is translated
	NoMasquerade []netip.Prefix // destinations that see the containers' own addresses all the same
	VTEP         string         // what leaves by this device keeps its source address
}

// attempts bounds how often Set starts over because somebody else changed nftables in between.
const attempts = 8

// Set makes the kernel agree with c in ns, nil for the calling thread's namespace. It compares first and sends only what
// differs, in one transaction: translation is never off in between. Connections that are translated already stay so.
// fault.Invalid: c has a prefix that is not IPv4.
func Set(ctx context.Context, ns *kernel.NS, c Config) error {
	w, err := wishOf(c)
	if err != nil {
		return err
	}
	_, err = converge(ctx, ns, func(s state) []change { return plan(w, s) }, true)
	return err
}

// Ensure is Set, but leaves local subnets in place that c does not name: several callers may each know one. What is stale
// stays until a Set.
func Ensure(ctx context.Context, ns *kernel.NS, c Config) error {
	w, err := wishOf(c)
	if err != nil {
		return err
	}
	local := w.sets[setLocal]
	_, err = converge(ctx, ns, func(s state) []change {
		w.sets[setLocal] = merge(append(slices.Clone(s.sets[setLocal].spans), local...))
		return plan(w, s)
	}, true)
	return err
}

// Present reports, by one question, whether a chain like ours with one rule is in the kernel. It does not look at the rule, which somebody
// else watches over.
func Present(ns *kernel.NS) (bool, error) {
	conn, err := kernel.DialNetfilter(ns)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	var b kernel.Batch
	requestChain(&b, unix.NFT_MSG_GETCHAIN, 0)
	answers, err := conn.Query(&b)
	if err != nil {
		return false, err
	}
	switch a := answers[0]; {
	case a.Err == nil:
		return isOurChain(a.Body) && chainUse(a.Body) == 1, nil
	case a.Err.Errno == unix.ENOENT:
		return false, nil
	default:
		return false, fmt.Errorf("look up nft chain %s: %w", chainName, a.Err)
	}
}

// Installed reports, by one look, whether some Config is in the kernel. It does not compare.
func Installed(ns *kernel.NS) (bool, error) {
	conn, err := kernel.DialNetfilter(ns)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	rules, err := observeRules(conn)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return len(rules) == 1 && rules[0] != foreignRule, err
}

// Explain returns what Set would do, as nft commands; nothing when the kernel agrees with c.
func Explain(ctx context.Context, ns *kernel.NS, c Config) ([]string, error) {
	w, err := wishOf(c)
	if err != nil {
		return nil, err
	}
	changes, err := converge(ctx, ns, func(s state) []change { return plan(w, s) }, false)
	var texts []string
	for _, c := range changes {
		texts = append(texts, c.String())
	}
	return texts, err
}

// Remove takes the chain and the sets away, and the table if nothing else is in it. What is not there is no error.
func Remove(ctx context.Context, ns *kernel.NS) error {
	conn, err := kernel.DialNetfilter(ns)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := removePorts(ctx, conn); err != nil {
		return fmt.Errorf("remove port maps: %w", err)
	}
	_, err = converge(ctx, ns, planRemoval, true)
	return err
}

// converge observes, plans and, if told to, applies, again while nftables changes under it.
func converge(ctx context.Context, ns *kernel.NS, plan func(state) []change, apply bool) ([]change, error) {
	conn, err := kernel.DialNetfilter(ns)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	for range attempts {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		var s state
		if s, err = observe(conn); err == nil {
			changes := plan(s)
			if len(changes) == 0 || !apply {
				return changes, nil
			}
			if err = conn.Transact(encode(changes), s.generation); err == nil {
				return changes, nil
			}
			err = explain(err, changes)
		}
		if !errors.Is(err, kernel.ErrGeneration) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
	}
	return nil, fault.Unavailablef("set address translation: nftables changed each of %d times: %w", attempts, err)
}

// explain says which change the kernel refused.
func explain(err error, changes []change) error {
	if r, ok := errors.AsType[*kernel.RequestError](err); ok && r.Index >= 0 && r.Index < len(changes) {
		return fmt.Errorf("nft %v: %w", changes[r.Index], err)
	}
	return fmt.Errorf("set address translation: %w", err)
}

// wish is a Config in the form that the kernel's state is compared with.
type wish struct {
	sets map[string][]span
	rule string
	vtep string
}

func wishOf(c Config) (wish, error) {
	w := wish{sets: map[string][]span{}, rule: ruleText(c.VTEP), vtep: c.VTEP}
	if c.VTEP == "" || len(c.VTEP) >= unix.IFNAMSIZ || strings.ContainsAny(c.VTEP, "\"*\n\x00") {
		return w, fault.Invalidf("VXLAN device %q: expected a device name such as silk-vtep", c.VTEP)
	}
	for name, prefixes := range map[string][]netip.Prefix{setLocal: c.Local, setNoMasquerade: c.NoMasquerade} {
		for _, p := range prefixes {
			if !p.IsValid() || !p.Addr().Is4() {
				return w, fault.Invalidf("network %v: expected an IPv4 network such as 10.255.0.0/16", p)
			}
		}
		w.sets[name] = spansOf(prefixes)
	}
	return w, nil
}
