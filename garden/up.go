package garden

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"code.cloudfoundry.org/silk/nat"
	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// upInput is what Garden says about a container to attach.
type upInput struct {
	PID        int                        `json:"pid"` // 0: the namespace is file descriptor 3
	Properties map[string]json.RawMessage `json:"properties"`
	NetIn      []netIn                    `json:"netin"`
	NetOut     json.RawMessage            `json:"netout_rules"` // handed on as it is
}

// netIn is a port of the host that leads to one of the container.
type netIn struct {
	HostPort      uint32 `json:"host_port"` // 0: any
	ContainerPort uint32 `json:"container_port"`
}

// upOutput is what Garden keeps about a container.
type upOutput struct {
	Properties    properties `json:"properties"`
	DNSServers    []string   `json:"dns_servers,omitempty"` // absent: Garden takes the host's
	SearchDomains []string   `json:"search_domains,omitempty"`
}

type properties struct {
	ContainerIP   string `json:"garden.network.container-ip"`
	ContainerIPv6 string `json:"garden.network.container-ipv6,omitempty"`
	HostIP        string `json:"garden.network.host-ip"` // means nothing any more
	MappedPorts   string `json:"garden.network.mapped-ports"`
	Interface     string `json:"garden.network.interface,omitempty"`
}

const noHostIP = "255.255.255.255"

// up attaches the container. What it has done is taken back when a later step fails.
func (n *networker) up(ctx context.Context) error {
	var in upInput
	if err := n.read(&in); err != nil {
		return err
	}
	list, err := n.loadList()
	if err != nil {
		return err
	}
	if list == nil {
		return errors.New("cni up failed: no ip allocated")
	}
	lock, err := n.lockWithin(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	var u undo
	u.add(func(context.Context) error { return n.removeLock() })
	out, err := n.attach(ctx, list, in, &u, lock)
	if err == nil {
		err = n.print(out)
	}
	if err != nil {
		return u.run(ctx, n.cfg.timeout(), err)
	}
	return nil
}

// namespace returns where the container's namespace is.
func (in *upInput) namespace() string {
	if in.PID == 0 {
		return "/proc/self/fd/3"
	}
	return "/proc/" + strconv.Itoa(in.PID) + "/ns/net"
}

// attach takes the steps of an up and adds to u how each is taken back.
func (n *networker) attach(ctx context.Context, list *libcni.NetworkConfigList, in upInput, u *undo, lock *os.File) (upOutput, error) {
	if _, err := n.bind(in.namespace()); err != nil {
		return upOutput{}, err
	}
	u.add(func(context.Context) error { return n.unbind() })

	pool := n.pool(list)
	ports, added, err := pool.acquire(ctx, n.handle, hostPortsOf(in.NetIn), true)
	if err != nil {
		return upOutput{}, fmt.Errorf("allocating port: %w", err)
	}
	if len(added) > 0 {
		u.add(func(ctx context.Context) error { return pool.release(ctx, n.handle, added...) })
	}
	for i := range in.NetIn {
		if p := in.NetIn[i].ContainerPort; p == 0 || p > maxPort {
			return upOutput{}, fmt.Errorf("container port %d: expected 1 to %d", p, maxPort)
		}
		in.NetIn[i].HostPort = uint32(ports[i])
	}
	with, err := inject(list, in.forPlugins())
	if err != nil {
		return upOutput{}, fmt.Errorf("cni up failed: %w", err)
	}

	u.add(func(ctx context.Context) error { return n.cniDel(ctx, lock, list) }) // also when ADD fails half way
	result, err := n.cniAdd(ctx, lock, with)
	if err != nil {
		return upOutput{}, err
	}
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return upOutput{}, fmt.Errorf("cni plugin result version incompatible: %w", err)
	}
	if err := n.redirect(); err != nil {
		return upOutput{}, fmt.Errorf("proxy redirect apply: %w", err)
	}
	u.add(n.unredirect)
	return n.answer(r, in.NetIn)
}

func hostPortsOf(list []netIn) []portRequest {
	want := make([]portRequest, len(list))
	for i, m := range list {
		want[i] = portRequest(m.HostPort)
	}
	return want
}

// forPlugins returns what is put into every plugin's configuration.
func (in *upInput) forPlugins() map[string]any {
	values := map[string]any{"runtimeConfig": map[string]any{"portMappings": in.NetIn, "netOutRules": in.NetOut}}
	if len(in.Properties) > 0 {
		values["metadata"] = in.Properties
	}
	return values
}

// answer words the result of the plugins for Garden.
func (n *networker) answer(r *types100.Result, ports []netIn) (upOutput, error) {
	out := upOutput{DNSServers: r.DNS.Nameservers, SearchDomains: n.cfg.SearchDomains, Properties: properties{HostIP: noHostIP}}
	for _, ip := range r.IPs {
		a, ok := netip.AddrFromSlice(ip.Address.IP)
		a = a.Unmap()
		switch {
		case !ok:
		case a.Is4() && out.Properties.ContainerIP == "":
			out.Properties.ContainerIP = a.String()
			if ip.Interface == nil {
				continue
			}
			i := *ip.Interface
			if i < 0 || i >= len(r.Interfaces) {
				return out, fmt.Errorf("no corresponding interface found, interface index: %d, number of interfaces: %d", i, len(r.Interfaces))
			}
			out.Properties.Interface = r.Interfaces[i].Name
		case a.Is6() && out.Properties.ContainerIPv6 == "":
			out.Properties.ContainerIPv6 = a.String()
		}
	}
	if out.Properties.ContainerIP == "" {
		return out, errors.New("expected an IPv4 address in the CNI result")
	}
	type mapping struct{ HostPort, ContainerPort uint32 }
	mapped := []mapping{}
	for _, p := range ports {
		mapped = append(mapped, mapping(p))
	}
	b, err := json.Marshal(mapped)
	out.Properties.MappedPorts = string(b)
	return out, err
}

// redirection returns what the configuration says about a proxy in the container.
func (n *networker) redirection() nat.Redirect {
	return nat.Redirect{To: n.cfg.redirectCIDR, Incoming: n.cfg.RedirectIngress, Port: uint16(n.cfg.ProxyPort), Except: uint32(*n.cfg.ProxyUID)}
}
