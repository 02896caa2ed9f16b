package endpoint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// AddPorts gives an endpoint more port maps, in the host namespace of the calling thread. Those that it has already are no error. They are recorded
// before the kernel has them; when that fails they are taken back, and when the process is killed in between, RestorePorts or the same again
// puts it right. fault.NotFound when there is no such endpoint, Invalid when a port map cannot be, Conflict when a port is another endpoint's.
func (d *Dir) AddPorts(ctx context.Context, k Key, maps []PortMap) (Record, error) {
	host, err := kernel.Dial(nil)
	if err != nil {
		return Record{}, err
	}
	defer host.Close()
	var added []PortMap
	h, r, err := d.rewrite(ctx, k, func(r *Record) error {
		r.PortMaps = slices.Clone(r.PortMaps)
		for _, m := range maps {
			if !slices.Contains(r.PortMaps, m) {
				added = append(added, m)
			}
		}
		r.PortMaps = append(r.PortMaps, added...)
		if err := validPorts(r.PortMaps, r.Subnet); err != nil {
			return err
		}
		list, err := d.files()
		if err != nil {
			return err
		}
		return d.claim(*r, list)
	})
	if err != nil {
		return Record{}, err
	}
	// The connections that the container has stay: none of them began at a port that has been free until now, but those of UDP that are forgotten
	// with each port map.
	if err = d.edge(host, r); err == nil {
		h.Close()
		return r, nil
	}
	err = errors.Join(err, r.unmapSome(host, added))
	h.Close()
	return Record{}, errors.Join(err, d.dropPorts(context.WithoutCancel(ctx), k, added))
}

// RemovePorts takes port maps from an endpoint. Those that it does not have are no error, nor is an endpoint that is gone.
func (d *Dir) RemovePorts(ctx context.Context, k Key, maps []PortMap) error {
	host, err := kernel.Dial(nil)
	if err != nil {
		return err
	}
	defer host.Close()
	h, r, err := d.rewrite(ctx, k, func(*Record) error { return nil })
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	err = r.unmapSome(host, maps)
	h.Close()
	if err != nil {
		return err
	}
	return d.dropPorts(ctx, k, maps)
}

// unmapSome takes those of the record's port maps that are in maps from the kernel. What they have in common with the others stays.
func (r Record) unmapSome(host *kernel.Conn, maps []PortMap) error {
	gone, rest := r, r
	gone.PortMaps = slices.DeleteFunc(slices.Clone(r.PortMaps), func(m PortMap) bool { return !slices.Contains(maps, m) })
	rest.PortMaps = slices.DeleteFunc(slices.Clone(r.PortMaps), func(m PortMap) bool { return slices.Contains(maps, m) })
	wait, err := gone.unmapPorts(true)
	wait()
	return errors.Join(err, rest.mapPorts(host))
}

// dropPorts takes port maps that the kernel does not have any more out of the record.
func (d *Dir) dropPorts(ctx context.Context, k Key, maps []PortMap) error {
	h, _, err := d.rewrite(ctx, k, func(r *Record) error {
		r.PortMaps = slices.DeleteFunc(slices.Clone(r.PortMaps), func(m PortMap) bool { return slices.Contains(maps, m) })
		return nil
	})
	if errors.Is(err, fault.NotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("take port maps back: %w", err)
	}
	return h.Close()
}

// maxNetOut bounds the rules of an endpoint's NetOut.
const maxNetOut = 10_000

// AddNetOut appends rules to an endpoint's NetOut. A list that nobody gave becomes one of these alone. A rule that is there already, in the same words,
// is not repeated. The policy agent has to be told. fault.NotFound when there is no such endpoint, Invalid when the rules are too many.
func (d *Dir) AddNetOut(ctx context.Context, k Key, rules []json.RawMessage) (Record, error) {
	h, r, err := d.rewrite(ctx, k, func(r *Record) error {
		var list []json.RawMessage
		if len(r.NetOut) > 0 {
			if err := json.Unmarshal(r.NetOut, &list); err != nil {
				return fault.Invalidf("egress rules of endpoint %v: %w", k, err)
			}
		}
		seen := map[string]bool{}
		for _, rule := range list {
			seen[string(rule)] = true
		}
		for _, rule := range rules {
			if rule = compact(rule); !seen[string(rule)] {
				seen[string(rule)] = true
				list = append(list, rule)
			}
		}
		if len(list) > maxNetOut {
			return fault.Invalidf("endpoint %v would have %d egress rules: expected at most %d", k, len(list), maxNetOut)
		}
		if list == nil {
			list = []json.RawMessage{}
		}
		b, err := json.Marshal(list)
		r.NetOut = compact(b)
		return err
	})
	if err != nil {
		return Record{}, err
	}
	return r, h.Close()
}
