package nft_test

import (
	"context"
	"testing"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/firewalltest"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/kernel"
)

type engine struct{ *nft.Table }

func (e engine) Enforce(ctx context.Context, rs firewall.Ruleset) error {
	_, err := e.Set(ctx, rs)
	return err
}

func TestConformance(t *testing.T) {
	packets := 100_000
	if testing.Short() {
		packets = 10_000
	}
	firewalltest.Run(t, packets, func(ns *kernel.NS) (firewalltest.Engine, error) {
		table, err := nft.Open(ns, nft.Options{})
		return engine{table}, err
	})
}

func TestEgressConformance(t *testing.T) {
	packets := 100_000
	if testing.Short() {
		packets = 10_000
	}
	firewalltest.RunEgress(t, packets, func(ns *kernel.NS) (firewalltest.Engine, error) {
		table, err := nft.Open(ns, nft.Options{})
		return engine{table}, err
	})
}
