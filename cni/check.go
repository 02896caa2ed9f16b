package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/nat"
)

// previous is what CHECK looks at in the result of the whole list.
type previous struct {
	Interfaces []struct {
		Name    string `json:"name"`
		MTU     int    `json:"mtu"`
		Sandbox string `json:"sandbox"`
	} `json:"interfaces"`
	IPs []struct {
		Address string `json:"address"`
	} `json:"ips"`
	Routes []struct {
		Dst string `json:"dst"`
	} `json:"routes"`
}

// check compares what an ADD made with what is there, and names each difference.
func (c *call) check(ctx context.Context) error {
	ns, err := c.openNetNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	var prev *previous
	if !isNull(c.cfg.PrevResult) {
		prev = new(previous)
		if err := json.Unmarshal(c.cfg.PrevResult, prev); err != nil {
			return &failure{code: codeDecode, msg: "invalid prevResult", err: err}
		}
	}
	dir, err := endpoint.Open(c.cfg.EndpointDir)
	if err != nil {
		return failed("open endpoint directory", err)
	}
	r, diffs, err := dir.Check(c.key(), ns)
	if errors.Is(err, fault.NotFound) {
		return &failure{code: codeUnknown, msg: "container is not attached", err: err}
	}
	if err != nil {
		return failed("check container", err)
	}
	found := prev.compare(r, diffs)
	if there, err := nat.Installed(nil); err != nil {
		return failed("check address translation", err)
	} else if !there {
		found = append(found, "address translation is missing: expected nft table inet "+nat.Table)
	}
	if err := c.policyReady(); err != nil {
		found = append(found, err.Error())
	}
	if c.cfg.Datastore != "" {
		has, err := c.storeHas(ctx, r)
		if err != nil {
			return failed("check store", err)
		}
		if !has {
			found = append(found, "entry in store "+c.cfg.Datastore+" is missing")
		}
	}
	if has, err := c.metadataHas(ctx, r); err != nil {
		return failed("check store of metadata", err)
	} else if !has {
		found = append(found, "entry in store "+c.wrapper.Datastore+" is missing")
	}
	if len(found) > 0 {
		return &failure{code: codePlugin, msg: "container's network is not as it was made", err: errors.New(strings.Join(found, "; ")), hint: "delete and add the container again"}
	}
	return nil
}

// compare returns the differences that matter: a plugin that came after us may have changed the interface's MTU and routes, and
// the result says so; of a lower MTU it need not, since tuning does not. (With another hardware address the host would not reach it.)
// It adds what is missing in the result.
func (p *previous) compare(r endpoint.Record, diffs []endpoint.Difference) []string {
	var found []string
	mtu, defaulted := r.MTU, true
	if p != nil {
		for _, i := range p.Interfaces {
			if i.Name == r.Interface && i.Sandbox != "" && i.MTU != 0 {
				mtu = i.MTU
			}
		}
		defaulted = slices.ContainsFunc(p.Routes, func(r struct {
			Dst string `json:"dst"`
		}) bool {
			return r.Dst == "0.0.0.0/0"
		})
		ours := slices.ContainsFunc(p.IPs, func(ip struct {
			Address string `json:"address"`
		}) bool {
			a, err := netip.ParsePrefix(ip.Address)
			return err == nil && slices.Contains(r.Addresses, a)
		})
		if !ours {
			found = append(found, fmt.Sprintf("address %v is missing in prevResult", r.Address()))
		}
	}
	for _, d := range diffs {
		changed := false
		if d.What == "mtu of "+r.Interface {
			have, err := strconv.Atoi(d.Have)
			changed = have == mtu || p != nil && err == nil && have >= minMTU && have < r.MTU
		}
		if !changed && (defaulted || !strings.HasPrefix(d.What, endpoint.DefaultRoute)) {
			found = append(found, d.String())
		}
	}
	return found
}

// accessWrite asks access(2) whether a file may be written.
const accessWrite = 2

// status says whether an ADD could succeed.
func (c *call) status(ctx context.Context) error {
	n, err := c.discover(c.inquire())
	if err != nil {
		f := failureOf(err)
		return &failure{code: codeUnavailable, msg: f.msg, err: f.err, hint: f.hint}
	}
	if err := c.admit(n); err != nil {
		f := failureOf(err)
		f.code = codeUnavailable
		if n.status == statusFenced {
			f.code = codeLimited
		}
		return f
	}
	if l, err := c.cfg.limits(); err != nil {
		return unavailable("unusable limits", err)
	} else if l != nil {
		if err := l.Validate(n.mtu); err != nil {
			return unavailable("unusable limits", err)
		}
	}
	dir, err := endpoint.Open(c.cfg.EndpointDir)
	if err != nil {
		return unavailable("open endpoint directory", err)
	}
	if err := syscall.Access(dir.Path(), accessWrite); err != nil {
		return unavailable("endpoint directory cannot be written", fmt.Errorf("%s: %w", dir.Path(), err))
	}
	taken, size, err := dir.Usage(n.subnet)
	if err != nil {
		return unavailable("subnet cannot be used", err)
	}
	if taken >= size {
		c.warn("subnet %v is full: all %d addresses are taken", n.subnet, size)
	}
	return nil
}
