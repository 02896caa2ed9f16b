package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
)

// egressRules is how many the container of an ADD with everything has.
const egressRules = 100

// edge compares an ADD with two port maps, a policy that is required and 100 egress rules with a plain one, in turns. The policy table is
// there, and who answers for the policy agent does so at once: what its work takes is measured with it (policy, firewall).
func (b *bed) edge(ctx context.Context, r *bench.Report) error {
	t, err := nft.Open(b.fresh.ns, nft.Options{})
	if err != nil {
		return err
	}
	defer t.Close()
	if _, err := t.Set(ctx, firewall.Ruleset{Network: netip.MustParsePrefix("10.255.0.0/16"), VTEP: "silk-vtep"}); err != nil {
		return err
	}
	var l net.Listener
	if err := b.fresh.ns.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:8722"); return err }); err != nil {
		return err
	}
	agent := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	go agent.Serve(l)
	defer agent.Close()
	var rules []any
	for i := range egressRules {
		rules = append(rules, map[string]any{"protocol": 1, "networks": []any{map[string]string{"start": fmt.Sprintf("10.%d.0.1", i), "end": fmt.Sprintf("10.%d.255.254", i)}}, "ports": []any{map[string]int{"start": 443, "end": 443}}})
	}
	config, err := json.Marshal(map[string]any{
		"cniVersion": "1.0.0", "name": "silk", "type": "silk-cni", "daemonPort": 23954, "endpointDir": b.fresh.daemon.EndpointDir(), "policy": "required",
		"metadata":      map[string]string{"policy_group_id": "app"},
		"runtimeConfig": map[string]any{"netOutRules": rules, "portMappings": []any{map[string]int{"host_port": 61000, "container_port": 8080}, map[string]int{"host_port": 61001, "container_port": 2222}}},
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(b.config("edge"), config, 0o644); err != nil {
		return err
	}
	var figures []figure
	for _, name := range []string{"fresh", "edge"} {
		for _, command := range []string{"ADD", "DEL"} {
			figures = append(figures, figure{name + command, b.fresh, func(c *container) (float64, error) { return b.plugin(name, command, c) }})
		}
	}
	samples, err := b.measure(figures, rounds, 1)
	if err != nil {
		return err
	}
	r.RatioAtMost("cni.add.edge", bench.Median(samples["edgeADD"]), "ms", bench.Median(samples["freshADD"]), 1.5)
	r.Add("cni.del.edge", bench.Median(samples["edgeDEL"]), "ms", bench.Median(samples["freshDEL"]))
	return nil
}
