package garden

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"code.cloudfoundry.org/silk/endpoint"
	"github.com/containernetworking/cni/libcni"
)

// down detaches the container. It may be repeated, and needs nothing that an up has left. What it reads of Garden means nothing.
func (n *networker) down(ctx context.Context) error {
	lock, err := n.lockWithin(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	list, err := n.loadList()
	if err != nil {
		// Without its configuration a container can be detached by what libcni remembers. If it remembers nothing, there is one only
		// if its namespace has been named.
		if _, statErr := os.Lstat(n.netns()); statErr == nil && !n.cached() {
			return err
		}
		n.warn("%v", err)
	}
	if err := n.cniDel(ctx, lock, list); err != nil {
		return err
	}
	if err := n.unbind(); err != nil {
		n.warn("%v", err)
	}
	if err := n.releasePorts(ctx, list); err != nil {
		n.warn("releasing ports: %v", err)
	}
	if err := n.removeLock(); err != nil {
		n.warn("%v", err)
	}
	return nil
}

// releasePorts frees the container's ports. Without a file there is none, and none is made.
func (n *networker) releasePorts(ctx context.Context, list *libcni.NetworkConfigList) error {
	if _, err := os.Stat(n.cfg.StateFile); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return n.pool(list).release(ctx, n.handle)
}

// pool returns the host's ports. The endpoints' records are those of the list's plugins.
func (n *networker) pool(list *libcni.NetworkConfigList) *pool {
	return &pool{
		path: n.cfg.StateFile, first: n.cfg.StartPort, count: n.cfg.TotalPorts, warn: n.warn,
		records: func() (map[string][]int, error) { return recordedPorts(endpointDir(list)) },
	}
}

// recordedPorts returns the TCP ports of the host that lead to containers, by these, as the endpoints' records have them.
func recordedPorts(path string) (map[string][]int, error) {
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	dir, err := endpoint.Open(path)
	if err != nil {
		return nil, err
	}
	records, _, err := dir.List() // one that cannot be read tells nothing about ports
	if err != nil {
		return nil, fmt.Errorf("read endpoint records: %w", err)
	}
	ports := map[string][]int{}
	for _, r := range records {
		for _, m := range r.PortMaps {
			if m.Protocol == "tcp" {
				ports[r.Container] = append(ports[r.Container], int(m.HostPort))
			}
		}
	}
	return ports, nil
}
