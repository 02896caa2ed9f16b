package nft_test

import (
	"context"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// crowd is a host with 250 containers and a policy for each of 65,535 tags.
func crowd() firewall.Input {
	in := example()
	in.Endpoints, in.Rules = nil, nil
	for i := range 250 {
		in.Endpoints = append(in.Endpoints, endpoint(byte(2+i), identity.Tag(1+i/2)))
	}
	for tag := 1; tag <= int(identity.MaxTag); tag++ {
		r := rule(identity.Tag(tag), identity.Tag(1+tag%125), policy.TCP, uint16(1+tag%60000), uint16(1+tag%60000))
		if tag%50 == 0 {
			r.Ports.Last += 9
		}
		in.Rules = append(in.Rules, r)
	}
	return in
}

// TestCrowd: elements do not multiply by the containers of a group, and all of it is listed and found again.
func TestCrowd(t *testing.T) {
	in := crowd()
	rs := compile(t, in)
	for _, unowned := range []bool{false, true} {
		h := newHost(t)
		table := h.open(nft.Options{Unowned: unowned})
		c := set(t, table, rs)
		if want := 65535 + 5*250 + 3; c.Desired != want {
			t.Errorf("%d elements, expected %d", c.Desired, want)
		}
		if c := set(t, table, rs); c.Sent != 0 {
			t.Errorf("a second set did %+v", c)
		}
		table.Forget()
		if c := set(t, table, rs); c.Sent != 0 || !c.Full || c.Observed != c.Desired {
			t.Errorf("a set that looks did %+v", c)
		}
		if unowned {
			h.sh("nft list ruleset > /dev/null")
		}
		more := in
		more.Rules = append(in.Rules[:len(in.Rules):len(in.Rules)], rule(7, 8, policy.UDP, 1, 1))
		if c := set(t, table, compile(t, more)); c.Sent != 1 || c.Full {
			t.Errorf("one policy more took %+v", c)
		}
		if c := set(t, table, compile(t, example())); c.Desired > 26 {
			t.Errorf("%+v", c)
		}
		holds(t, table, compile(t, example()))
	}
}

// TestFillingThatWasCutShort: a writer that ended between the transactions of a large Set leaves sets that nothing refers to. The next one goes on from there.
func TestFillingThatWasCutShort(t *testing.T) {
	h := newHost(t)
	table := h.open(nft.Options{Unowned: true})
	before := compile(t, example())
	set(t, table, before)
	h.sh(`nft add set inet silk-policy allow-0001 '{ type mark . inet_proto . inet_service; elements = { 5 . tcp . 80, 0xffff . tcp . 9 }; }'
		nft add set inet silk-policy ranges-0002-1 '{ type mark . inet_proto . inet_service; flags interval; elements = { 5 . tcp . 80-90 }; }'`)
	table.Close()
	again := h.open(nft.Options{})
	after := compile(t, crowd())
	set(t, again, after)
	holds(t, again, after)
	set(t, again, before)
	holds(t, again, before)
}

// TestSetStopsWhenAsked: nothing is done for a context that has ended.
func TestSetStopsWhenAsked(t *testing.T) {
	h := newHost(t)
	table := h.open(nft.Options{})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := table.Set(ctx, compile(t, example())); err == nil {
		t.Error("no error")
	}
	if lines, err := table.Plan(context.Background(), compile(t, example())); err != nil || len(lines) == 0 {
		t.Errorf("something was done: %v", err)
	}
}

// TestManyRanges: a group with many ranges has them in several sets, and a change to one range costs little.
func TestManyRanges(t *testing.T) {
	f := newFleet(t, nft.Options{})
	rules := func(n int, more ...policy.Rule) []policy.Rule {
		for i := range n {
			more = append(more, rule(identity.Tag(100+i%5000), 2, policy.UDP, uint16(1000+i/5000*10), uint16(1005+i/5000*10)))
		}
		return append(more, rule(1, 2, policy.TCP, 80, 80))
	}
	mine := rule(1, 2, policy.UDP, 5000, 5009)
	for _, n := range []int{10, 700, 600, 20000, 1500, 700, 100, 0} {
		f.set(rules(n, mine)...)
		for host := range 2 {
			holds(t, f.tables[host], compile(t, f.in[host]))
			f.arrives(0, host, f.packet(1, host, 2, policy.UDP, 5009), false)
			f.isRefused(0, host, nft.NoPolicy, f.packet(1, host, 2, policy.UDP, 5010), false)
		}
		f.set(rules(n)...)
		f.isRefused(0, 1, nft.NoPolicy, f.packet(1, 1, 2, policy.UDP, 5009), false)
		h := f.w.Hosts[1]
		if out := h.Shell(h.NS, "nft list ruleset"); n == 20000 && !strings.Contains(out, "meta mark & 0x0000003f vmap @shards-0002-64") {
			t.Errorf("with %d ranges:\n%.20000s", n, out)
		}
		f.in[0].Rules = rules(n, mine)
		if c := set(t, f.tables[0], compile(t, f.in[0])); c.Sent > 12 {
			t.Errorf("one range more of %d took %+v", n, c)
		}
	}
}
