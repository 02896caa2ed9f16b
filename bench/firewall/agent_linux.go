package firewall

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/bench/server"
	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/revision"
)

const (
	members      = 50  // containers on the host of the agent, each of a group of its own
	agentChanges = 100 // policies that come and go
)

// agent measures vxlan-policy-agent, in a process of its own, on a host with containers that 60,000 policies touch: its memory, and what it computes for
// one policy that comes or goes, from the answer of policy-server until the kernel has it. Policies come from the store and the API of policy-server, in
// this process.
func agent(ctx context.Context, r *bench.Report) error {
	dir, err := os.MkdirTemp("", "silk-bench-agent-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ns, err := kernel.NewNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := shell(ns, "ip link set lo up\nsysctl -qw net.ipv4.ip_forward=1"); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	store, closeStore, err := openStore(ctx, dir)
	if err != nil {
		return err
	}
	defer closeStore()
	last, err := fill(ctx, store)
	if err != nil {
		return err
	}
	detach, err := populate(ctx, ns, filepath.Join(dir, "endpoints"))
	defer detach()
	if err != nil {
		return err
	}
	p, stop, err := startAgent(ctx, ns, dir, store, nil)
	defer stop()
	if err != nil {
		return err
	}
	return p.measure(ctx, r, store, last)
}

func member(i int) identity.Group { return groupOf(identity.Tag(0x8000 + i)) }

// openStore opens a store of policies in dir, and runs it until it is closed.
func openStore(ctx context.Context, dir string) (store *policysql.Store, closeStore func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	store, err = policysql.Open(ctx, policysql.Config{DB: sqldb.Config{Type: sqldb.SQLite, Path: filepath.Join(dir, "policy.db")}}, slog.New(slog.DiscardHandler))
	if err != nil {
		cancel()
		return nil, nil, err
	}
	stopped := make(chan error, 1)
	go func() { stopped <- store.Run(ctx) }()
	return store, func() { cancel(); <-stopped; store.Close() }, nil
}

// fill makes the policies: each member of the host has as many.
func fill(ctx context.Context, store *policysql.Store) (last revision.Revision, err error) {
	var ps []policy.Policy
	for i := range many {
		ports := policy.Ports{First: uint16(8000 + i/3000/members), Last: uint16(8000 + i/3000/members)}
		ps = append(ps, policy.Policy{Source: groupOf(identity.Tag(1 + i%3000)), Destination: member(i / 3000 % members), Protocol: policy.TCP, Ports: ports})
	}
	for len(ps) > 0 {
		n := min(len(ps), 5000)
		if last, err = store.CreateWithin(ctx, ps[:n], 0); err != nil {
			return last, err
		}
		ps = ps[n:]
	}
	return last, nil
}

// populate attaches the containers. detach takes them away again.
func populate(ctx context.Context, ns *kernel.NS, path string) (detach func(), err error) {
	var inside []*kernel.NS
	detach = func() {
		for _, x := range inside {
			x.Close()
		}
	}
	records, err := endpoint.Open(path)
	if err != nil {
		return detach, err
	}
	for i := range members {
		x, err := kernel.NewNS()
		if err != nil {
			return detach, err
		}
		inside = append(inside, x)
		err = ns.Do(func() error {
			_, err := records.Attach(ctx, endpoint.Spec{
				Key: endpoint.Key{Network: "silk", Container: fmt.Sprintf("c%d", i), Interface: "eth0"}, Path: "/nowhere", Namespace: x,
				Subnet: netip.MustParsePrefix("10.255.30.0/24"), MTU: 1450, Group: string(member(i)),
			}, nil)
			return err
		})
		if err != nil {
			return detach, err
		}
	}
	return detach, nil
}

// agentProcess is a running vxlan-policy-agent.
type agentProcess struct{ pid int }

// startAgent serves the store in ns and starts an agent there that watches it, with more keys in its configuration. stop ends both.
func startAgent(ctx context.Context, ns *kernel.NS, dir string, store *policysql.Store, more map[string]any) (p *agentProcess, stop func(), err error) {
	stop = func() {}
	bin, err := server.Build(ctx, dir, "vxlan-policy-agent")
	if err != nil {
		return nil, stop, err
	}
	url, cert, end, err := serve(ns, dir, store)
	if err != nil {
		return nil, stop, err
	}
	stop = end
	keys := map[string]any{
		"policy_server_url": url, "ca_cert_file": cert.ca, "client_cert_file": cert.cert, "client_key_file": cert.key, "host": "127.0.0.1",
		"endpoint_dir": filepath.Join(dir, "endpoints"), "state_dir": filepath.Join(dir, "state"),
	}
	maps.Copy(keys, more)
	cfg, err := json.Marshal(keys)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "agent.json"), cfg, 0o600)
	}
	if err != nil {
		return nil, stop, err
	}
	cmd := exec.Command(bin, "-config-file", filepath.Join(dir, "agent.json"))
	cmd.Stderr = os.Stderr
	if err := ns.Do(cmd.Start); err != nil {
		return nil, stop, err
	}
	return &agentProcess{cmd.Process.Pid}, func() {
		cmd.Process.Signal(os.Interrupt)
		cmd.Wait()
		end()
	}, nil
}

// files of certificates.
type files struct{ ca, cert, key string }

// serve offers the watch of a store in ns.
func serve(ns *kernel.NS, dir string, store *policysql.Store) (url string, f files, stop func(), err error) {
	ca, err := pki.OpenCA(filepath.Join(dir, "pki"))
	if err != nil {
		return "", f, nil, err
	}
	f.ca = ca.CertFile()
	if f.cert, f.key, err = ca.Issue("localhost", netip.MustParseAddr("127.0.0.1")); err != nil {
		return "", f, nil, err
	}
	tc, err := service.Certificates{CA: f.ca, Cert: f.cert, Key: f.key}.Server()
	if err != nil {
		return "", f, nil, err
	}
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp4", "127.0.0.1:0"); return err }); err != nil {
		return "", f, nil, err
	}
	h := policyhttp.InternalHandler(policyhttp.Backend{Watch: store.WatchFor, Tag: store.Tag, Polled: store.DeployedPoll, WatchGroups: store.SecurityGroups().WatchFor, TagLength: 2},
		slog.New(slog.DiscardHandler), policyhttp.InternalOptions{})
	s := &http.Server{Handler: h, ErrorLog: slog.NewLogLogger(slog.NewTextHandler(io.Discard, nil), slog.LevelError)}
	go s.Serve(tls.NewListener(l, tc))
	return "https://" + l.Addr().String(), f, func() { s.Close() }, nil
}

// measure waits until the policies are in force and then changes one at a time.
func (p *agentProcess) measure(ctx context.Context, r *bench.Report, store *policysql.Store, last revision.Revision) error {
	start := time.Now()
	if err := inForce(ctx, store, last); err != nil {
		return err
	}
	r.Add("firewall.agent.60000.start", float64(time.Since(start))/1e6, "ms", math.NaN())
	r.Add("firewall.agent.60000.start.cpu", 1000*cpuOf(p.pid), "ms", math.NaN())
	loaded, err := p.status("VmRSS")
	if err != nil {
		return err
	}
	before := cpuOf(p.pid)
	var took []float64
	for i := range agentChanges {
		one := []policy.Policy{{Source: groupOf(identity.Tag(1 + i)), Destination: member(i % members), Protocol: policy.UDP, Ports: policy.Ports{First: 53, Last: 53}}}
		for _, change := range []func() (revision.Revision, error){
			func() (revision.Revision, error) { return store.CreateWithin(ctx, one, 0) },
			func() (revision.Revision, error) { return store.Remove(ctx, one) },
		} {
			ms, err := bench.Millis(func() error {
				at, err := change()
				if err == nil {
					err = inForce(ctx, store, at)
				}
				return err
			})
			if err != nil {
				return err
			}
			took = append(took, ms)
		}
	}
	cpu := 1000 * (cpuOf(p.pid) - before) / float64(len(took))
	changed, err := p.status("VmRSS")
	peak, err2 := p.status("VmHWM")
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	r.AtMost("firewall.agent.60000.change.cpu", cpu, "ms", 20)
	r.Add("firewall.agent.60000.change.p50", bench.Median(took), "ms", math.NaN())
	r.AtMost("firewall.agent.60000.resident.loaded", loaded, "MiB", 64)
	r.AtMost("firewall.agent.60000.resident.changed", changed, "MiB", 64)
	r.AtMost("firewall.agent.60000.resident.peak", peak, "MiB", 64)
	return nil
}

// inForce waits until the one host has a revision in its kernel.
func inForce(ctx context.Context, store *policysql.Store, at revision.Revision) error {
	for deadline := time.Now().Add(time.Minute); ; {
		f, err := store.Force(ctx, at, nil, time.Second)
		if err != nil {
			return err
		}
		if f.InForce && f.Reporting > 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("revision %v is not in force after a minute: %+v", at, f)
		}
	}
}

// status reads a size of the process, in MiB.
func (p *agentProcess) status(key string) (float64, error) { return bench.Memory(p.pid, key) }
