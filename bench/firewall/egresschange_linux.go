package firewall

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/secgroup"
)

const (
	groupChanges = 9
	firstProbe   = 10000 // port that the first version of the group that changes lets out to
)

// egressChange measures a change of a security group that all containers of a host have, from before it is made until the first and the last of them reach
// what it lets them reach: through the database, the API of policy-server and vxlan-policy-agent, which is a process of its own. Each container has 1,000
// rules: in one case all have the same, in the other 900 of each are its own.
func egressChange(ctx context.Context, r *bench.Report) error {
	for _, x := range []struct {
		name   string
		shared bool
	}{{"shared", true}, {"own", false}} {
		if err := changeOf(ctx, r, "firewall.egress.change."+x.name, x.shared); err != nil {
			return err
		}
	}
	return nil
}

func changeOf(ctx context.Context, r *bench.Report, name string, shared bool) error {
	dir, err := os.MkdirTemp("", "silk-bench-egress-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	w := &world{containers: map[string]*kernel.NS{}}
	defer w.close()
	if w.hosts[0], err = kernel.NewNS(); err != nil {
		return err
	}
	if w.containers[outside], err = kernel.NewNS(); err != nil {
		return err
	}
	if err := errors.Join(shell(w.hosts[0], "ip link set lo up\nsysctl -qw net.ipv4.ip_forward=1"), w.leadOut()); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	store, closeStore, err := openStore(ctx, dir)
	if err != nil {
		return err
	}
	defer closeStore()
	groups := store.SecurityGroups()
	common, err := fillGroups(ctx, groups, shared)
	if err != nil {
		return err
	}
	probes, detach, err := attachMany(ctx, w.hosts[0], filepath.Join(dir, "endpoints"))
	defer detach()
	if err != nil {
		return err
	}
	p, stop, err := startAgent(ctx, w.hosts[0], dir, store, map[string]any{"enable_asg_syncing": true})
	defer stop()
	if err != nil {
		return err
	}
	if err := reached(w.containers[outside], probes, firstProbe); err != nil {
		return err
	}
	before := cpuOf(p.pid)
	var took []float64
	for version := 1; version <= groupChanges; version++ {
		rules := secgroup.Format(commonRules(version))
		ms, err := bench.Millis(func() error {
			if _, err := groups.Change(ctx, common, secgroup.Change{Rules: &rules}); err != nil {
				return err
			}
			return reached(w.containers[outside], probes, firstProbe+version)
		})
		if err != nil {
			return err
		}
		took = append(took, ms)
	}
	r.AtMost(name, bench.Median(took), "ms", 1000)
	r.Add(name+".cpu", 1000*(cpuOf(p.pid)-before)/groupChanges, "ms", math.NaN())
	resident, err := p.status("VmHWM")
	r.Add(name+".resident.peak", resident, "MiB", math.NaN())
	return err
}

// commonRules are those of the group that changes.
func commonRules(version int) []secgroup.Rule {
	to := addresses[outside]
	rules := egressRules(manyRules/10, 1+version%2)
	rules[len(rules)-1] = secgroup.Rule{Protocol: secgroup.UDP, Destinations: []secgroup.Range{{First: to, Last: to}},
		Ports: []policy.Ports{{First: uint16(firstProbe + version), Last: uint16(firstProbe + version)}}}
	return rules
}

func spaceOf(container int) string { return fmt.Sprintf("space-%d", container) }

// fillGroups makes the groups of all containers and returns the GUID of the one that changes.
func fillGroups(ctx context.Context, g *policysql.SecurityGroups, shared bool) (common string, err error) {
	var spaces []string
	for i := range containers {
		spaces = append(spaces, spaceOf(i))
	}
	kept, err := g.Create(ctx, secgroup.Record{Name: "common", Rules: secgroup.Format(commonRules(0)), RunningSpaces: spaces})
	if err != nil {
		return "", err
	}
	rest := egressRules(manyRules-manyRules/10, 3)
	if shared {
		_, err = g.Create(ctx, secgroup.Record{Name: "rest", Rules: secgroup.Format(rest), RunningSpaces: spaces})
		return kept.GUID, err
	}
	for i, s := range spaces {
		a := netip.AddrFrom4([4]byte{99, 0, 0, byte(i)})
		rest[0] = secgroup.Rule{Destinations: []secgroup.Range{{First: a, Last: a}}}
		if _, err := g.Create(ctx, secgroup.Record{Name: s, Rules: secgroup.Format(rest), RunningSpaces: []string{s}}); err != nil {
			return "", err
		}
	}
	return kept.GUID, nil
}

// attachMany attaches the containers, and returns a socket in the first and in the last. detach takes them away again.
func attachMany(ctx context.Context, host *kernel.NS, path string) (probes []*net.UDPConn, detach func(), err error) {
	var inside []io.Closer
	detach = func() {
		for _, x := range inside {
			x.Close()
		}
	}
	records, err := endpoint.Open(path)
	if err != nil {
		return nil, detach, err
	}
	for i := range containers {
		x, err := kernel.NewNS()
		if err != nil {
			return nil, detach, err
		}
		inside = append(inside, x)
		metadata, err := json.Marshal(map[string]string{"space_id": spaceOf(i), "container_workload": secgroup.App})
		if err != nil {
			return nil, detach, err
		}
		if err := host.Do(func() error {
			_, err := records.Attach(ctx, endpoint.Spec{
				Key: endpoint.Key{Network: "silk", Container: fmt.Sprintf("c%d", i), Interface: "eth0"}, Path: "/nowhere", Namespace: x,
				Subnet: netip.MustParsePrefix("10.255.30.0/24"), MTU: 1450, Metadata: metadata,
			}, nil)
			return err
		}); err != nil {
			return nil, detach, err
		}
		if i != 0 && i != containers-1 {
			continue
		}
		if err := x.Do(func() error {
			c, err := net.ListenUDP("udp4", nil)
			if err == nil {
				probes, inside = append(probes, c), append(inside, c)
			}
			return err
		}); err != nil {
			return nil, detach, err
		}
	}
	return probes, detach, nil
}

// reached waits until something arrives from each socket at a port outside.
func reached(out *kernel.NS, probes []*net.UDPConn, port int) error {
	var l *net.UDPConn
	to := netip.AddrPortFrom(addresses[outside], uint16(port))
	if err := out.Do(func() (err error) { l, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(to)); return err }); err != nil {
		return err
	}
	defer l.Close()
	from := map[netip.AddrPort]bool{}
	var b [16]byte
	for deadline := time.Now().Add(time.Minute); len(from) < len(probes); {
		if time.Now().After(deadline) {
			return fmt.Errorf("port %d was not reached from all containers after a minute", port)
		}
		for _, p := range probes {
			if _, err := p.WriteToUDPAddrPort([]byte("x"), to); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				continue // an answer to an earlier one: it was refused
			}
		}
		l.SetReadDeadline(time.Now().Add(time.Millisecond))
		for {
			_, a, err := l.ReadFromUDPAddrPort(b[:])
			if err != nil {
				break
			}
			from[a] = true
		}
	}
	return nil
}
