package garden

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/secgroup"
	"github.com/containernetworking/cni/libcni"
)

// netInInput asks for one more port of the host. Garden also says HostIP, the address that it was started with, which need not be one of the host: a
// port is the container's where those of its up are.
type netInInput struct {
	HostPort      uint32 `json:"HostPort"` // 0: any
	ContainerIP   string `json:"ContainerIP"`
	ContainerPort uint32 `json:"ContainerPort"` // 0: that of the host
}

// netIn leads one more port of the host to a container that lives.
func (n *networker) netIn(ctx context.Context) error {
	var in netInInput
	if err := n.read(&in); err != nil {
		return err
	}
	if in.ContainerPort > maxPort {
		return fmt.Errorf("container port %d: expected 1 to %d, or 0 for that of the host", in.ContainerPort, maxPort)
	}
	c, err := n.find(ctx, in.ContainerIP)
	if err != nil {
		return err
	}
	defer c.lock.Close()
	m := endpoint.PortMap{Protocol: "tcp", HostIP: ours(c.list).instance()}
	if c.has(m, in) { // the same again: an attempt that was killed may have recorded it and no more
		m.HostPort, m.ContainerPort = uint16(in.HostPort), uint16(in.ContainerPort)
		if _, err := c.dir.AddPorts(ctx, c.record.Key, []endpoint.PortMap{m}); err != nil {
			return err
		}
		return n.print(netIn{in.HostPort, in.ContainerPort})
	}
	pool := n.pool(c.list)
	ports, added, err := pool.acquire(ctx, n.handle, []portRequest{portRequest(in.HostPort)}, false)
	if err != nil {
		return fmt.Errorf("allocating port: %w", err)
	}
	var u undo
	if len(added) > 0 {
		u.add(func(ctx context.Context) error { return pool.release(ctx, n.handle, added...) })
	}
	m.HostPort, m.ContainerPort = uint16(ports[0]), uint16(in.ContainerPort)
	if m.ContainerPort == 0 {
		m.ContainerPort = m.HostPort
	}
	_, err = c.dir.AddPorts(ctx, c.record.Key, []endpoint.PortMap{m})
	if err == nil {
		u.add(func(ctx context.Context) error { return c.dir.RemovePorts(ctx, c.record.Key, []endpoint.PortMap{m}) })
		err = n.print(netIn{uint32(m.HostPort), uint32(m.ContainerPort)})
	}
	if err != nil {
		return u.run(ctx, 0, err)
	}
	return nil
}

// has reports whether the port that is asked for leads to where it is asked to lead.
func (c *living) has(m endpoint.PortMap, in netInInput) bool {
	if in.HostPort == 0 || in.HostPort > maxPort {
		return false
	}
	m.HostPort, m.ContainerPort = uint16(in.HostPort), uint16(in.ContainerPort)
	for _, have := range c.record.PortMaps {
		if have == m {
			return true
		}
	}
	return false
}

// netOut lets a container that lives reach more.
func (n *networker) netOut(ctx context.Context) error {
	var in struct {
		ContainerIP string          `json:"container_ip"`
		Rule        json.RawMessage `json:"netout_rule"`
	}
	if err := n.read(&in); err != nil {
		return err
	}
	return n.allow(ctx, in.ContainerIP, []json.RawMessage{in.Rule})
}

// bulkNetOut is netOut with several rules.
func (n *networker) bulkNetOut(ctx context.Context) error {
	var in struct {
		ContainerIP string            `json:"container_ip"`
		Rules       []json.RawMessage `json:"netout_rules"`
	}
	if err := n.read(&in); err != nil {
		return err
	}
	return n.allow(ctx, in.ContainerIP, in.Rules)
}

// allow records rules and has the policy agent see to them.
func (n *networker) allow(ctx context.Context, ip string, rules []json.RawMessage) error {
	text, err := json.Marshal(rules)
	if err != nil {
		return fmt.Errorf("netout rules: %w", err)
	}
	if _, problems := secgroup.Garden.Read(text); len(problems) > 0 {
		return fmt.Errorf("netout rules: %v", problems[0])
	}
	c, err := n.find(ctx, ip)
	if err != nil {
		return err
	}
	defer c.lock.Close()
	if len(rules) == 0 {
		return nil
	}
	if rules, err = asLibcni(text); err != nil {
		return err
	}
	if _, err := c.dir.AddNetOut(ctx, c.record.Key, rules); err != nil {
		return fmt.Errorf("record netout rules: %w", err)
	}
	if err := c.tellAgent(ctx); err != nil {
		n.warn("the rules are recorded, and count when vxlan-policy-agent comes to them: %v", err)
	}
	return nil
}

// asLibcni words rules as they come to the record by an up: libcni sorts their keys. So one that is there is known for the same.
func asLibcni(list []byte) ([]json.RawMessage, error) {
	var values []any
	if err := json.Unmarshal(list, &values); err != nil {
		return nil, fmt.Errorf("netout rules: %w", err)
	}
	rules := make([]json.RawMessage, len(values))
	for i, v := range values {
		b, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("netout rules: %w", err)
		}
		rules[i] = b
	}
	return rules, nil
}

// living is a container that is attached, its lock held.
type living struct {
	lock   *os.File
	list   *libcni.NetworkConfigList
	dir    *endpoint.Dir
	record endpoint.Record
}

// find returns the container. Its address is to be the one that Garden knows, if it says one.
func (n *networker) find(ctx context.Context, ip string) (*living, error) {
	if _, err := os.Lstat(n.netns()); err != nil {
		return nil, fmt.Errorf("container %s is not up: %w", n.handle, err)
	}
	list, err := n.loadList()
	if err != nil {
		return nil, err
	}
	c := &living{list: list}
	if c.lock, err = n.lockWithin(ctx); err != nil {
		return nil, err
	}
	if err = c.look(n.handle, n.cfg.Interface, ip); err == nil {
		return c, nil
	}
	if _, gone := os.Lstat(n.netns()); gone != nil { // a down was before us, and the lock is new
		err = errors.Join(err, n.removeLock())
	}
	c.lock.Close()
	return nil, err
}

func (c *living) look(handle, device, ip string) error {
	var err error
	if c.dir, err = endpoint.Open(endpointDir(c.list)); err != nil {
		return err
	}
	records, bad, err := c.dir.List()
	if err != nil {
		return err
	}
	for _, r := range records {
		if r.Container != handle || r.Interface != device {
			continue
		}
		if a, err := netip.ParseAddr(ip); ip != "" && (err != nil || a != r.Address()) {
			return fmt.Errorf("container %s has the address %v, not %q", handle, r.Address(), ip)
		}
		c.record = r
		return nil
	}
	for _, b := range bad {
		if b.Key.Container == handle {
			return fmt.Errorf("container %s: %w", handle, b.Err)
		}
	}
	return fmt.Errorf("container %s has no endpoint in %s: only silk-cni's containers can be given more while they live", handle, c.dir.Path())
}

// agentTimeout bounds the wait for the policy agent.
const agentTimeout = 15 * time.Second

// tellAgent has the policy agent go through what is recorded, if the container is under policy, and returns when the kernel has it.
func (c *living) tellAgent(ctx context.Context) error {
	k := ours(c.list)
	if k.Policy != "required" && (k.Policy != "" || k.PolicyAgent == "") {
		return nil
	}
	if k.PolicyAgent == "" {
		k.PolicyAgent = "127.0.0.1:8722"
	}
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	u := url.URL{Scheme: "http", Host: k.PolicyAgent, Path: "/force-policy-poll-cycle"}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	res, err := (&http.Client{Transport: &http.Transport{Proxy: nil, DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(res.Body, 500))
		return fmt.Errorf("status %d: %s", res.StatusCode, b)
	}
	return nil
}
