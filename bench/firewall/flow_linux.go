package firewall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/policy"
	"golang.org/x/sys/unix"
)

const (
	flowRounds = 9
	flowTurns  = 3 // of each host in a round
	flowRuns   = 4 // of a turn, each followed by the end of its connections
	flowLength = 250 * time.Millisecond
	flowDrain  = 1200 * time.Millisecond // until the agent has written what it heard
)

// flow measures what the flow log costs: new connections between two containers of a host whose agent writes one line for each, beside a host whose
// agent does not. All connections end within the turn, as they would in the long run. Client and server share one CPU; the agent, as it would be on a
// host with more, is where the kernel puts it, and what it computes is a figure of its own.
func flow(ctx context.Context, r *bench.Report) error {
	runtime.LockOSThread() // processes end with the thread that started them
	defer runtime.UnlockOSThread()
	var hosts []*flowHost
	defer func() {
		for _, h := range hosts {
			h.close()
		}
	}()
	for _, on := range []bool{false, true} {
		h, err := newFlowHost(ctx, on)
		hosts = append(hosts, h)
		if err != nil {
			return err
		}
	}
	off, on := hosts[0], hosts[1]
	var byClock, byCPU, rates []float64
	connections := 0.0
	before := cpuOf(on.agent.pid)
	for round := range flowRounds {
		of, perCPU := map[*flowHost][]float64{}, map[*flowHost][]float64{}
		for i := range 2 * flowTurns {
			h := hosts[(i+round)%2]
			x, err := h.turn()
			if err != nil {
				return err
			}
			of[h], perCPU[h] = append(of[h], x.perSecond), append(perCPU[h], x.perCPU)
			if h == on {
				connections += x.count
			}
		}
		rates = append(rates, bench.Median(of[on]))
		byClock, byCPU = append(byClock, bench.Median(of[on])/bench.Median(of[off])), append(byCPU, bench.Median(perCPU[on])/bench.Median(perCPU[off]))
	}
	cpu := 1e6 * (cpuOf(on.agent.pid) - before) / connections
	lines, err := os.ReadFile(on.log)
	if err != nil {
		return err
	}
	r.Add("flow.crr.rate", bench.Median(rates), "1/s", math.NaN())
	v := bench.Median(byClock)
	r.Bar("flow.crr", v, "ratio", math.NaN(), ">= 0.90", v >= 0.9)
	r.Add("flow.crr.cpu", bench.Median(byCPU), "ratio", math.NaN())
	r.Add("flow.crr.agent.cpu", cpu, "us/connection", math.NaN())
	told := float64(bytes.Count(lines, []byte("\n")))
	// A last packet that comes after its connection was forgotten makes another one.
	r.Bar("flow.crr.lines", told/connections, "per connection", math.NaN(), "0.999 to 1.001", math.Abs(told/connections-1) <= 0.001)
	return nil
}

// flowHost is a host with two containers and an agent.
type flowHost struct {
	world   *world
	ns      *kernel.NS
	agent   *agentProcess
	ends    *ends
	log     string
	closers []func()
}

func (h *flowHost) close() {
	for i := len(h.closers) - 1; i >= 0; i-- {
		h.closers[i]()
	}
}

func newFlowHost(ctx context.Context, on bool) (h *flowHost, err error) {
	h = &flowHost{world: &world{containers: map[string]*kernel.NS{}}}
	dir, err := os.MkdirTemp("", "silk-bench-flow-")
	if err != nil {
		return h, err
	}
	h.closers = append(h.closers, func() { os.RemoveAll(dir) })
	h.log = filepath.Join(dir, "flows.log")
	if h.ns, err = kernel.NewNS(); err != nil {
		return h, err
	}
	h.closers = append(h.closers, func() { h.ns.Close() })
	if err := shell(h.ns, "ip link set lo up\nsysctl -qw net.ipv4.ip_forward=1"); err != nil {
		return h, err
	}
	if err := h.attach(ctx, filepath.Join(dir, "endpoints")); err != nil {
		return h, err
	}
	ctx, cancel := context.WithCancel(ctx)
	h.closers = append(h.closers, cancel)
	store, closeStore, err := openStore(ctx, dir)
	if err != nil {
		return h, err
	}
	h.closers = append(h.closers, closeStore)
	last, err := store.CreateWithin(ctx, []policy.Policy{{Source: "web", Destination: "api", Protocol: policy.TCP, Ports: policy.Ports{First: port, Last: port}}}, 0)
	if err != nil {
		return h, err
	}
	p, stop, err := startAgent(ctx, h.ns, dir, store, map[string]any{"iptables_c2c_logging": on, "flow_log": map[string]any{"file": h.log}})
	h.closers = append(h.closers, stop)
	if h.agent = p; err != nil {
		return h, err
	}
	if err := inForce(ctx, store, last); err != nil {
		return h, err
	}
	if err := h.logs(on); err != nil {
		return h, err
	}
	if h.ends, err = measures[1].open(ctx, h.world, "a1", "a2"); h.ends != nil {
		h.closers = append(h.closers, h.ends.close)
	}
	return h, err
}

// attach makes the containers.
func (h *flowHost) attach(ctx context.Context, path string) error {
	records, err := endpoint.Open(path)
	if err != nil {
		return err
	}
	for name, group := range map[string]string{"a1": "web", "a2": "api"} {
		inside, err := kernel.NewNS()
		if err != nil {
			return err
		}
		h.closers = append(h.closers, func() { inside.Close() })
		h.world.containers[name] = inside
		if err := h.ns.Do(func() error {
			_, err := records.Attach(ctx, endpoint.Spec{
				Key: endpoint.Key{Network: "silk", Container: name, Interface: "eth0"}, Path: "/nowhere", Namespace: inside,
				Subnet: netip.MustParsePrefix("10.255.1.0/24"), MTU: 1450, Group: group, Requested: addresses[name],
			}, nil)
			return err
		}); err != nil {
			return err
		}
		if err := shell(inside, "sysctl -qw net.ipv4.tcp_max_tw_buckets=0 net.ipv4.ip_local_port_range='1024 65000'\nip link set lo up"); err != nil {
			return err
		}
	}
	return nil
}

// logs waits until the rules are as they should be.
func (h *flowHost) logs(on bool) error {
	for deadline := time.Now().Add(20 * time.Second); ; {
		err := shell(h.ns, "sleep 0.1; nft list table inet silk-policy | grep -q 'silk ok c2c'")
		if (err == nil) == on {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("the rules do not log as they should: %v", on), err)
		}
	}
}

// turn measures, in connections that began and ended.
func (h *flowHost) turn() (rate, error) {
	var took time.Duration
	var n, cpu float64
	for range flowRuns {
		x, err := h.ends.run(flowLength)
		if err != nil {
			return rate{}, err
		}
		began := time.Now()
		if err := h.forgetAll(); err != nil {
			return rate{}, err
		}
		took += time.Duration(x.count/x.perSecond*1e9) + time.Since(began)
		n, cpu = n+x.count, cpu+x.count/x.perCPU+time.Since(began).Seconds()
	}
	time.Sleep(flowDrain)
	return rate{n / took.Seconds(), n / cpu, n}, nil
}

// forgetAll makes the kernel forget all connections, in one request.
func (h *flowHost) forgetAll() error {
	c, err := kernel.DialNetfilter(h.ns)
	if err != nil {
		return err
	}
	defer c.Close()
	var b kernel.Batch
	b.Add(unix.NFNL_SUBSYS_CTNETLINK<<8|2, 0, kernel.NFGen(unix.AF_INET)) // IPCTNL_MSG_CT_DELETE
	refused, err := c.Do(&b)
	for _, r := range refused {
		err = errors.Join(err, r)
	}
	return err
}
