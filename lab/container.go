package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

const (
	cniConfDir  = "/etc/cni/net.d" // in the host
	cniCacheDir = "/run/cni"       // in the host
	cniTimeout  = 20 * time.Second // of one operation
	ifname      = "eth0"
)

// container is a network namespace on a host, attached by silk-cni, with a responder in it.
type container struct {
	name      string
	responder *task // nil until the container is attached

	mu      sync.Mutex
	address netip.Addr // zero: not attached
	err     error      // why not
}

func (c *container) note(a netip.Addr, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.address, c.err = a, err
}

func (c *container) state() (netip.Addr, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.address, c.err
}

func netnsPath(name string) string { return filepath.Join(netNames, name) }

// settle attaches a container that is wanted and removes one that is leaving. The pass is held.
func (n *node) settle(ctx context.Context, want containerEntry) error {
	n.mu.Lock()
	c := n.containers[want.Name]
	if c == nil {
		c = &container{name: want.Name}
		n.containers[want.Name] = c
	}
	n.mu.Unlock()
	if want.Leaving {
		return n.detach(ctx, c)
	}
	addr, err := n.attach(ctx, want)
	if err != nil {
		err = fmt.Errorf("attach %s: %w", want.Name, err)
	}
	c.note(addr, err)
	if err != nil || c.responder != nil {
		return err
	}
	role := c.name + "/responder"
	p := newProgram(n.s.dir, role, n.s.log, func() (*process, error) { return n.startResponder(c.name, role) })
	n.mu.Lock()
	defer n.mu.Unlock()
	c.responder = keep(ctx, p)
	return nil
}

func (n *node) startResponder(name, role string) (p *process, err error) {
	err = n.inContainer(n.space, name, func(sp *space) error {
		p, err = n.start(sp, role, "silk", "lab", "respond", "--as", name)
		return err
	})
	return p, err
}

// inContainer calls fn with the space of a container on the host whose space is sp.
func (n *node) inContainer(sp *space, name string, fn func(*space) error) error {
	var ns *kernel.NS
	err := sp.do(func() (err error) { ns, err = kernel.OpenNS(netnsPath(name)); return err })
	if err != nil {
		return err
	}
	defer ns.Close()
	return fn(sp.with(ns))
}

// attach returns the address of the container, which is attached now if it is not. Whether it is, is read from
// its namespace and from what libcni noted on the host.
func (n *node) attach(ctx context.Context, want containerEntry) (a netip.Addr, err error) {
	name := want.Name
	var linked bool
	err = n.inContainer(n.space, name, func(sp *space) error {
		return sp.do(func() (err error) { linked, err = hasLink(ifname); return err })
	})
	made := errors.Is(err, fs.ErrNotExist)
	if made {
		err = n.makeContainer(name)
	}
	if err != nil {
		return a, err
	}
	err = n.cni(ctx, name, func(ctx context.Context, c *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		if n.s.named() {
			rt.Args = want.nameArgs()
		}
		if len(want.Ports) > 0 {
			rt.CapabilityArgs = map[string]any{"portMappings": portMappings(want.Ports)}
		}
		if want.Group != "" {
			if list, err = inGroup(list, want.Group); err != nil {
				return err
			}
		}
		if linked {
			if res, err := c.GetNetworkListCachedResult(list, rt); err == nil && res != nil {
				a, err = take(name, res)
				return err
			}
		}
		if err := c.GetStatusNetworkList(ctx, list); err != nil { // no lease yet, or fenced
			return fmt.Errorf("its host takes no containers now: %w", err)
		}
		if !made { // an ADD that was cut short may have left something
			if err := c.DelNetworkList(ctx, list, rt); err != nil {
				return err
			}
		}
		res, err := c.AddNetworkList(ctx, list, rt)
		if err == nil {
			a, err = take(name, res)
		}
		if err != nil { // as the specification asks of a runtime
			return errors.Join(err, c.DelNetworkList(ctx, list, rt))
		}
		return nil
	})
	return a, err
}

// makeContainer makes and names the namespace on the host.
func (n *node) makeContainer(name string) error {
	ns, err := kernel.NewNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := ns.Do(loopbackUp); err != nil {
		return err
	}
	return n.space.do(func() error {
		if err := kernel.UnbindNS(netnsPath(name)); err != nil {
			return err
		}
		return ns.Bind(netnsPath(name))
	})
}

// detach undoes attach and forgets the container. The pass is held.
func (n *node) detach(ctx context.Context, c *container) error {
	n.mu.Lock()
	c.responder.end()
	c.responder = nil
	n.mu.Unlock()
	if a, _ := c.state(); a.IsValid() {
		n.detached = append(n.detached, a)
	}
	err := n.cni(ctx, c.name, func(ctx context.Context, cni *libcni.CNIConfig, list *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		return cni.DelNetworkList(ctx, list, rt)
	})
	if err == nil {
		err = n.inContainer(n.space, c.name, func(sp *space) error {
			id, err := sp.net.ID()
			if err != nil {
				return err
			}
			return sweepSpaces(map[kernel.NSID]bool{id: true})
		})
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err == nil {
		err = n.space.do(func() error { return errors.Join(kernel.UnbindNS(netnsPath(c.name)), dropResolver(c.name)) })
	}
	if err == nil {
		err = n.s.update(func(j *journal) error {
			j.Containers = without(j.Containers, func(e containerEntry) bool { return e.Name == c.name })
			return nil
		})
	}
	if err != nil {
		err = fmt.Errorf("remove %s: %w", c.name, err)
		c.note(netip.Addr{}, err)
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.containers, c.name)
	return nil
}

func without[E any](s []E, drop func(E) bool) []E { return slices.DeleteFunc(slices.Clone(s), drop) }

// collect removes, once after this supervisor has come to the host, what is attached and not wanted. The pass is held.
func (n *node) collect(ctx context.Context, wanted []containerEntry) error {
	if n.collected || !n.isHost() {
		return nil
	}
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}} // null would remove nothing
	for _, c := range wanted {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: c.Name, IfName: ifname})
	}
	err := n.cni(ctx, "", func(ctx context.Context, c *libcni.CNIConfig, list *libcni.NetworkConfigList, _ *libcni.RuntimeConf) error {
		return c.GCNetworkList(ctx, list, args)
	})
	n.collected = err == nil
	return err
}

// cni calls fn on the host, with its network configuration, as a container runtime there would.
func (n *node) cni(ctx context.Context, name string, fn func(context.Context, *libcni.CNIConfig, *libcni.NetworkConfigList, *libcni.RuntimeConf) error) error {
	ctx, cancel := context.WithTimeout(ctx, cniTimeout)
	defer cancel()
	return n.space.do(func() error {
		list, err := libcni.ConfListFromFile(n.network())
		if err != nil {
			return err
		}
		c := libcni.NewCNIConfigWithCacheDir([]string{n.s.programs()}, cniCacheDir, nil)
		return fn(ctx, c, list, &libcni.RuntimeConf{ContainerID: name, NetNS: netnsPath(name), IfName: ifname})
	})
}

// take returns the address that the plugin's result has for the container, and gives it the resolver that it has. It is called on the host.
func take(name string, r types.Result) (netip.Addr, error) {
	res, err := types100.GetResult(r)
	if err != nil {
		return netip.Addr{}, err
	}
	if len(res.IPs) == 0 {
		return netip.Addr{}, errors.New("the plugin's result has no address")
	}
	a, ok := netip.AddrFromSlice(res.IPs[0].Address.IP)
	if !ok {
		return netip.Addr{}, fmt.Errorf("the plugin's result has the address %v", res.IPs[0].Address)
	}
	return a.Unmap(), writeResolver(name, res.DNS)
}

// kill ends the container's responder.
func (c *container) kill(n *node) error {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if c.responder == nil {
		return fault.Unavailablef("the responder of %s does not run at the moment", c.name)
	}
	return c.responder.signal(9)
}
