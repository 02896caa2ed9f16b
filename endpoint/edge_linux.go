package endpoint

import (
	"fmt"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/nat"
	"golang.org/x/sys/unix"
)

// devconfRouteLocalnet is from linux/ip.h.
const devconfRouteLocalnet = 26

// edge makes what an endpoint may have beside its devices, as far as it is missing: its port maps and limits. The caller undoes what a failed edge leaves.
func (d *Dir) edge(host *kernel.Conn, r Record) error {
	if r.Limits != nil {
		if err := r.limit(host); err != nil {
			return err
		}
	}
	if err := r.mapPorts(host); err != nil {
		return err
	}
	if !r.fromLoopback() {
		return nil
	}
	// The rule that keeps the container from the host's loopback is there by now.
	var b kernel.Batch
	b.Add(unix.RTM_NEWLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, r.Device)
	conf(&b, devconfRouteLocalnet, 1)
	refused, err := host.Do(&b)
	if err == nil && len(refused) > 0 {
		err = refused[0]
	}
	if err != nil {
		return fmt.Errorf("set route_localnet on %s: %w", r.Device, err)
	}
	return nil
}

// edgeDifferences compares what edge makes with the kernel.
func (r Record) edgeDifferences(host *kernel.Conn) ([]Difference, error) {
	diffs, err := r.limitDifferences(host)
	if err != nil || len(r.PortMaps) == 0 {
		return diffs, err
	}
	missing, whole, err := nat.MissingPorts(r.portMaps())
	if err != nil {
		return nil, err
	}
	if !whole {
		diffs = append(diffs, Difference{"chains of port maps", "nft table inet " + nat.Table + " as silk-cni makes it", ""})
	}
	for _, m := range missing {
		diffs = append(diffs, Difference{"port map", m.String(), ""})
	}
	if r.fromLoopback() {
		diffs = append(diffs, sysctl("net/ipv4/conf/"+r.Device+"/route_localnet", "1")...)
	}
	return diffs, nil
}
