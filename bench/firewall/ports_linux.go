package firewall

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"runtime"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/nat"
)

// otherMaps is how many ports of the host lead elsewhere.
const otherMaps = 500

// plainDNAT is what one writes by hand for a single port.
const plainDNAT = `nft add table ip plain
nft 'add chain ip plain prerouting { type nat hook prerouting priority -100; }'
nft add rule ip plain prerouting tcp dport %d dnat to %v`

// portMaps measures connections from the underlay to a container by a mapped port of its host, against one plain rule of nft that does the same: with
// nothing else, and with the guard of the overlay and the policy table, as an operator has it. They take turns as in traffic.
func portMaps(ctx context.Context, r *bench.Report) error {
	runtime.LockOSThread() // the processes end with the thread that started them
	defer runtime.UnlockOSThread()
	var all []*ends
	var worlds []*variant
	defer func() {
		for _, e := range all {
			e.close()
		}
		for _, v := range worlds {
			v.close()
		}
	}()
	connections := measures[1]
	for _, name := range []string{"plain", "silk", "whole"} {
		v, err := portVariant(ctx, name)
		worlds = append(worlds, v)
		if err != nil {
			return err
		}
		e := &ends{of: connections}
		all = append(all, e)
		if e.server, e.toServer, e.ofServer, err = child(ctx, v.world.containers["a2"], "serve", connections.name, 0, addresses["a2"]); err != nil {
			return err
		}
		if line, err := e.ofServer.ReadString('\n'); err != nil || line != "ready\n" {
			return fmt.Errorf("server behind %s: said %q: %w", name, line, err)
		}
		if e.client, e.toClient, e.ofClient, err = child(ctx, v.world.hosts[1], "call", connections.name, 0, leases[0].Underlay); err != nil {
			return err
		}
	}
	rates := make([][]float64, len(all))
	var silk, whole []float64
	for range rounds {
		var toSilk, toWhole []float64
		for range turns {
			var now [3]float64
			for i, e := range all {
				x, err := e.run(length)
				if err != nil {
					return err
				}
				now[i] = x.perSecond
				rates[i] = append(rates[i], x.perSecond)
			}
			toSilk, toWhole = append(toSilk, now[1]/now[0]), append(toWhole, now[2]/now[0])
		}
		silk, whole = append(silk, bench.Median(toSilk)), append(whole, bench.Median(toWhole))
		for _, v := range worlds {
			if err := v.world.forget(); err != nil {
				return err
			}
		}
	}
	r.Add("nat.portmap.crr.plain", bench.Median(rates[0]), "/s", math.NaN())
	r.Add("nat.portmap.crr.silk", bench.Median(rates[1]), "/s", bench.Median(rates[0]))
	ratio := bench.Median(silk)
	r.Bar("nat.portmap.crr", ratio, "of plain", math.NaN(), ">= 0.9 of one plain nft rule", ratio >= 0.9)
	r.Add("nat.portmap.crr.with_guard_and_policy", bench.Median(whole), "of plain", math.NaN())
	return nil
}

// portVariant makes a world in which a port of host 0 leads to the container a2.
func portVariant(ctx context.Context, name string) (*variant, error) {
	v := &variant{name: name}
	var err error
	if v.world, err = newWorld(ctx); err != nil {
		return v, err
	}
	host := v.world.hosts[0]
	if name != "whole" {
		for _, ns := range v.world.hosts {
			if err := shell(ns, noGuard); err != nil {
				return v, err
			}
		}
	}
	quick := "sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=5 net.netfilter.nf_conntrack_tcp_timeout_close=2"
	if name == "plain" {
		return v, shell(host, fmt.Sprintf(plainDNAT, port, addresses["a2"])+"\n"+quick)
	}
	if name == "whole" {
		t, err := nft.Open(host, nft.Options{})
		if err != nil {
			return v, err
		}
		v.tables = append(v.tables, t)
		rs, err := compile(10, "a1", "a2")
		if err == nil {
			_, err = t.Set(ctx, rs)
		}
		if err != nil {
			return v, err
		}
	}
	if err := mapPorts(ctx, host); err != nil {
		return v, err
	}
	return v, shell(host, quick)
}

// mapPorts does what daemon and plugin do for a port that is used and for others.
func mapPorts(ctx context.Context, host *kernel.NS) error {
	if err := nat.Set(ctx, host, nat.Config{Local: []netip.Prefix{leases[0].Subnet}, NoMasquerade: []netip.Prefix{overlayNet}, VTEP: vtep}); err != nil {
		return err
	}
	maps := []nat.PortMap{{Host: netip.AddrPortFrom(netip.Addr{}, port), Protocol: nat.TCP, To: netip.AddrPortFrom(addresses["a2"], port)}}
	for i := range otherMaps {
		maps = append(maps, nat.PortMap{Host: netip.AddrPortFrom(netip.Addr{}, uint16(61000+i)), Protocol: nat.TCP, To: netip.AddrPortFrom(addresses["a1"], 80)})
	}
	return host.Do(func() error {
		return nat.MapPorts(ctx, maps, func(netip.Addr) (bool, error) { return true, nil })
	})
}
