package daemon

import (
	"context"
	"errors"
	"net/netip"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// attachments counts the containers on the host, whoever attached them.
type attachments struct {
	records   *endpoint.Dir // nil: none can be read
	datastore string        // the deployed silk-cni's store; "" means none
}

// count looks at the kernel's container devices, the endpoint records and the deployed store. A container lives if the kernel has
// its device or the namespace of its record still exists. An entry of the deployed store without a device is stale: its
// writer leaves such entries behind. What cannot be read is in Err; the rest counts.
func (a attachments) count(ctx context.Context) Containers {
	live, err := containerDevices()
	if live == nil {
		live = map[netip.Addr]bool{}
	}
	var records []endpoint.Record
	var rerr error
	if a.records != nil {
		records, _, rerr = a.records.List() // what cannot be parsed counts by its device
	}
	for _, r := range records {
		if namespaceLives(r) {
			for _, p := range r.Addresses {
				live[p.Addr()] = true
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, countTimeout)
	defer cancel()
	entries, serr := storeAddresses(ctx, a.datastore)
	c := Containers{Err: errors.Join(err, rerr, serr)}
	for _, e := range entries {
		if !live[e] {
			c.Stale++
		}
	}
	for a := range live {
		c.Addresses = append(c.Addresses, netip.PrefixFrom(a, a.BitLen()))
	}
	c.Live = len(c.Addresses)
	return c
}

// namespaceLives reports whether the namespace that a record was made for still has its name. One that lives on without a
// name, in a process only, still has its device.
func namespaceLives(r endpoint.Record) bool {
	if r.Path == "" || r.Namespace.IsZero() {
		return false
	}
	ns, err := kernel.OpenNS(r.Path)
	if err != nil {
		return false
	}
	defer ns.Close()
	id, err := ns.ID()
	return err == nil && id == r.Namespace
}
