package cni

import (
	"context"
	"encoding/json"
	"fmt"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// del detaches the container. It needs neither daemon nor namespace nor an ADD before it.
func (c *call) del(ctx context.Context) error {
	dir, err := endpoint.Open(c.cfg.EndpointDir)
	if err != nil {
		return failed("open endpoint directory", err)
	}
	var ns *kernel.NS
	if c.netns != "" {
		// One that cannot be opened took its interfaces along; the plugin's own has never had ours.
		if ns, err = c.openNetNS(); err == nil {
			defer ns.Close()
		} else {
			ns = nil
		}
	}
	if c.wrapper != nil && c.wrapper.unreadable {
		return c.detachAnywhere(ctx, dir, ns)
	}
	return c.detach(ctx, dir, c.key(), ns)
}

func (c *call) detach(ctx context.Context, dir *endpoint.Dir, k endpoint.Key, ns *kernel.NS) error {
	err := dir.Detach(ctx, k, ns, func(r endpoint.Record) error {
		c.leaveStore(ctx, r)
		return nil
	})
	if err != nil {
		return failed("detach container", err)
	}
	return nil
}

// leaveStore takes the endpoint out of the store. A store that cannot be written is no reason to keep a container from going.
func (c *call) leaveStore(ctx context.Context, r endpoint.Record) {
	if err := c.storeDelete(ctx, r); err != nil {
		c.warn("container stays in the store: %v", err)
	}
	if err := c.metadataDelete(ctx, r); err != nil {
		c.warn("container stays in the store of metadata: %v", err)
	}
}

// gc detaches every endpoint of this network that the runtime does not list. Without a list it does nothing.
func (c *call) gc(ctx context.Context) error {
	valid, listed, err := c.cfg.attachments()
	if err != nil {
		return &failure{code: codeDecode, msg: "invalid list of attachments", err: err}
	}
	if !listed {
		return nil
	}
	dir, err := endpoint.Open(c.cfg.EndpointDir)
	if err != nil {
		return failed("open endpoint directory", err)
	}
	_, err = dir.Collect(ctx, c.cfg.Name, valid, func(r endpoint.Record) error {
		c.leaveStore(ctx, r)
		return nil
	})
	if err != nil {
		return failed("collect stale endpoints", err)
	}
	return nil
}

// attachments returns the union of the two lists of a GC. listed tells that there is at least one.
func (c *config) attachments() (valid []endpoint.Key, listed bool, err error) {
	for _, raw := range []json.RawMessage{c.Valid1, c.Valid2} {
		if isNull(raw) {
			continue
		}
		var list []struct {
			Container string `json:"containerID"`
			Interface string `json:"ifname"`
		}
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, false, err
		}
		for i, a := range list {
			if a.Container == "" || a.Interface == "" {
				return nil, false, fmt.Errorf("attachment %d has no containerID or no ifname", i)
			}
			valid = append(valid, endpoint.Key{Network: c.Name, Container: a.Container, Interface: a.Interface})
		}
		listed = true
	}
	return valid, listed, nil
}
