package firewall

import (
	"context"
	"fmt"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
)

const many = 60_000

// changes measures Sets. All times are of the whole call: comparing, sending and what the kernel does.
func changes(ctx context.Context, r *bench.Report) error {
	full, err := compile(many, "b1")
	if err != nil {
		return err
	}
	var nothing []float64
	for range 5 {
		ms, err := fromNothing(ctx, full)
		if err != nil {
			return err
		}
		nothing = append(nothing, ms)
	}
	r.AtMost("firewall.set.60000.from_nothing", bench.Median(nothing), "ms", 500)
	ns, err := kernel.NewNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	t, err := nft.Open(ns, nft.Options{})
	if err != nil {
		return err
	}
	defer t.Close()
	base := rules(many, tags["b1"])
	// One policy in a hundred is for a range, as is one of those that come and go.
	for i := 0; i < many-2; i += 100 {
		base[i].Ports.Last += 9
	}
	sets := map[string]firewall.Ruleset{}
	for name, more := range map[string][]policy.Rule{"": nil, "port": {rule(1, tags["b1"], policy.TCP, 9999, 9999)},
		"range": {rule(1, tags["b1"], policy.TCP, 20000, 20099)}} {
		rs, problems := firewall.Compile(firewall.Input{Network: overlayNet, VTEP: vtep, Endpoints: []firewall.Endpoint{endpointOf("b1")}, Rules: append(base[:many:many], more...)})
		if len(problems) > 0 {
			return fmt.Errorf("compile policies: %v", problems[0])
		}
		sets[name] = rs
	}
	if _, err := t.Set(ctx, sets[""]); err != nil {
		return err
	}
	for _, x := range []struct {
		name  string
		limit float64
	}{{"port", 1}, {"range", 5}} {
		var added, removed []float64
		for range 30 {
			for _, y := range []struct {
				set   string
				times *[]float64
			}{{x.name, &added}, {"", &removed}} {
				var c nft.Changes
				ms, err := bench.Millis(func() (err error) { c, err = t.Set(ctx, sets[y.set]); return err })
				if err == nil && c.Sent == 0 {
					err = errEmpty
				}
				if err != nil {
					return err
				}
				*y.times = append(*y.times, ms)
			}
		}
		r.AtMost("firewall.set.60000.add_"+x.name, bench.Median(added), "ms", x.limit)
		r.AtMost("firewall.set.60000.remove_"+x.name, bench.Median(removed), "ms", x.limit)
	}
	var idle []float64
	for range 30 {
		ms, err := bench.Millis(func() error { _, err := t.Set(ctx, sets[""]); return err })
		if err != nil {
			return err
		}
		idle = append(idle, ms)
	}
	r.AtMost("firewall.set.60000.unchanged", bench.Median(idle), "ms", 1)
	return nil
}

func fromNothing(ctx context.Context, rs firewall.Ruleset) (float64, error) {
	ns, err := kernel.NewNS()
	if err != nil {
		return 0, err
	}
	defer ns.Close()
	t, err := nft.Open(ns, nft.Options{})
	if err != nil {
		return 0, err
	}
	defer t.Close()
	return bench.Millis(func() error { _, err := t.Set(ctx, rs); return err })
}
