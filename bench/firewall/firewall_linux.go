// Package firewall measures what the packets of containers pay for the firewall and what its changes cost.
//
// Traffic runs between containers in namespaces of its own, on one host and across two, five times side by side: without any firewall,
// with connection tracking and no rules, with 10 policies and with 60,000 of which the one that is used came last, and with those and the guard of
// the overlay, which is what an operator has. They take turns of some
// milliseconds, so that what else the machine does meets all alike: a turn's ratio is of two rates measured one after the other, a round's ratio the
// median of its turns', and what is judged is the median of the rounds'.
package firewall

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/overlay"
	"code.cloudfoundry.org/silk/policy"
)

// Run measures the bars of the firewall.
func Run(ctx context.Context, r *bench.Report) error {
	for _, measure := range []func(context.Context, *bench.Report) error{changes, cut, agent, flow, portMaps, egress, traffic} {
		if err := measure(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

var tags = map[string]identity.Tag{"a1": 1, "a2": 2, "b1": 3}

func groupOf(t identity.Tag) identity.Group { return identity.Group(fmt.Sprintf("%036x", int(t))) }

func rule(from, to identity.Tag, p policy.Protocol, first, last uint16) policy.Rule {
	return policy.Rule{Policy: policy.Policy{Source: groupOf(from), Destination: groupOf(to), Protocol: p, Ports: policy.Ports{First: first, Last: last}},
		SourceTag: from, DestinationTag: to}
}

// rules returns n policies for what a group may be sent, the last of which are those that traffic from a1 needs.
func rules(n int, to identity.Tag) []policy.Rule {
	out := make([]policy.Rule, 0, n)
	for i := range n - 2 {
		out = append(out, rule(identity.Tag(0x1000+i%3000), to, policy.TCP, uint16(8080+i/3000), uint16(8080+i/3000)))
	}
	return append(out, rule(tags["a1"], to, policy.TCP, port, port), rule(tags["a1"], to, policy.UDP, port, port))
}

func compile(n int, names ...string) (firewall.Ruleset, error) {
	in := firewall.Input{Network: overlayNet, VTEP: vtep}
	for _, name := range names {
		in.Endpoints = append(in.Endpoints, endpointOf(name))
	}
	for _, to := range []string{"a2", "b1"} {
		in.Rules = append(in.Rules, rules(n, tags[to])...)
	}
	rs, problems := firewall.Compile(in)
	if len(problems) > 0 {
		return rs, fmt.Errorf("compile policies: %v", problems[0])
	}
	return rs, nil
}

// variant is a world and what guards it.
type variant struct {
	name   string
	world  *world
	tables []*nft.Table
}

func (v *variant) close() {
	for _, t := range v.tables {
		t.Close()
	}
	if v.world != nil {
		v.world.close()
	}
}

// guarded is the variant that keeps the rules that come with the overlay.
const guarded = "guarded"

// noGuard takes those away.
const noGuard = "nft delete table inet " + overlay.Table + "\n"

const trackOnly = `nft add table ip track
nft 'add chain ip track forward { type filter hook forward priority 0; policy accept; }'
nft add rule ip track forward ct state established,related accept`

// variants in the order in which the first round has them.
func variants(ctx context.Context) (vs []*variant, err error) {
	for _, name := range []string{"none", "tracking", "10", "60000", guarded} {
		v := &variant{name: name}
		vs = append(vs, v)
		if v.world, err = newWorld(ctx); err != nil {
			return vs, err
		}
		n := 60000
		fmt.Sscan(name, &n)
		for i, ns := range v.world.hosts {
			if name != guarded {
				err = shell(ns, noGuard)
			}
			switch {
			case err != nil || name == "none":
			case name == "tracking":
				err = shell(ns, trackOnly)
			default:
				var t *nft.Table
				if t, err = nft.Open(ns, nft.Options{}); err != nil {
					return vs, err
				}
				v.tables = append(v.tables, t)
				var rs firewall.Ruleset
				if rs, err = compile(n, [][]string{{"a1", "a2"}, {"b1"}}[i]...); err == nil {
					_, err = t.Set(ctx, rs)
				}
			}
			if err != nil {
				return vs, err
			}
			if name != "none" {
				// So that what closed connections leave behind is not what is measured.
				if err := shell(ns, "sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=5 net.netfilter.nf_conntrack_tcp_timeout_close=2"); err != nil {
					return vs, err
				}
			}
		}
	}
	return vs, nil
}

const (
	rounds = 9
	turns  = 25 // of each variant in a round
	length = 20 * time.Millisecond
)

// bars are what the rates at 60,000 policies must reach of those of other variants: requests, connections, packets.
var bars = map[string]map[string][3]float64{
	"same":   {"none": {0.85, 0.85, 0.75}, "tracking": {0.93, 0.93, 0.85}, "10": {0.95, 0.95, 0.9}},
	"across": {"none": {0.84, 0.76, 0.65}, "tracking": {0.93, 0.93, 0.85}, "10": {0.95, 0.95, 0.9}},
}

func traffic(ctx context.Context, r *bench.Report) error {
	vs, err := variants(ctx)
	defer func() {
		for _, v := range vs {
			v.close()
		}
	}()
	if err != nil {
		return err
	}
	for _, p := range []struct{ name, from, to string }{{"same", "a1", "a2"}, {"across", "a1", "b1"}} {
		for i, m := range measures {
			rates, err := m.all(ctx, vs, p.from, p.to)
			if err != nil {
				return err
			}
			for _, base := range []string{"none", "tracking", "10"} {
				judge(r, fmt.Sprintf("firewall.%s.%s.60000_of_%s", p.name, m.name, base), rates["60000"], rates[base], bars[p.name][base][i])
			}
			judge(r, fmt.Sprintf("firewall.%s.%s.guarded_of_none", p.name, m.name), rates[guarded], rates["none"], 0)
		}
	}
	return nil
}

// all measures every variant in rounds of turns and returns the rates of each by round and turn.
func (m measure) all(ctx context.Context, vs []*variant, from, to string) (map[string][][]rate, error) {
	runtime.LockOSThread() // processes end with the thread that started them
	defer runtime.UnlockOSThread()
	var open []*ends
	defer func() {
		for _, e := range open {
			e.close()
		}
	}()
	for _, v := range vs {
		e, err := m.open(ctx, v.world, from, to)
		open = append(open, e)
		if err != nil {
			return nil, fmt.Errorf("with %s: %w", v.name, err)
		}
	}
	rates := map[string][][]rate{}
	for round := range rounds {
		for _, v := range vs {
			rates[v.name] = append(rates[v.name], nil)
			if err := v.world.forget(); err != nil {
				return nil, err
			}
		}
		for turn := range turns {
			for k := range vs {
				i := (k + turn) % len(vs)
				x, err := open[i].run(length)
				if err != nil {
					return nil, fmt.Errorf("with %s: %w", vs[i].name, err)
				}
				rates[vs[i].name][round] = append(rates[vs[i].name][round], x)
			}
		}
	}
	return rates, nil
}

// judge reports the median of the rounds' ratios, by the clock, which is what is promised, and by the CPU time that was spent, which a
// machine that does other things too disturbs less. 0 is no bar.
func judge(r *bench.Report, name string, ours, base [][]rate, bar float64) {
	var rates, byClock, byCPU []float64
	for i := range ours {
		var perTurn, clock, cpu []float64
		for j := range ours[i] {
			perTurn = append(perTurn, ours[i][j].perSecond)
			clock = append(clock, ours[i][j].perSecond/base[i][j].perSecond)
			cpu = append(cpu, ours[i][j].perCPU/base[i][j].perCPU)
		}
		rates = append(rates, bench.Median(perTurn))
		byClock = append(byClock, bench.Median(clock))
		byCPU = append(byCPU, bench.Median(cpu))
	}
	v := bench.Median(byClock)
	r.Add(name+".rate", bench.Median(rates), "1/s", math.NaN())
	if bar == 0 {
		r.Add(name, v, "ratio", math.NaN())
	} else {
		r.Bar(name, v, "ratio", math.NaN(), fmt.Sprintf(">= %.2f", bar), v >= bar)
	}
	r.Add(name+".cpu", bench.Median(byCPU), "ratio", math.NaN())
	if os.Getenv("SILK_BENCH_VERBOSE") != "" {
		fmt.Fprintf(os.Stderr, "%s clock %.3f cpu %.3f\n", name, byClock, byCPU)
	}
}

var errEmpty = errors.New("nothing was sent")
