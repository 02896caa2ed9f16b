package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/nat"
)

// add attaches the container.
func (c *call) add(ctx context.Context) error {
	if !isNull(c.cfg.PrevResult) {
		return &failure{code: codeConfig, msg: c.name() + " must be the first plugin of its list", err: errors.New("prevResult: another plugin has made an interface already")}
	}
	if err := c.cfg.unsupported(); err != nil {
		return err
	}
	asked := c.inquire()
	defer asked.drop()
	spec, err := c.spec()
	if err != nil {
		return err
	}
	if spec.Namespace, err = c.openNetNS(); err != nil {
		return err
	}
	defer spec.Namespace.Close()
	dir, err := endpoint.Open(c.cfg.EndpointDir)
	if err != nil {
		return failed("open endpoint directory", err)
	}
	translated, err := nat.Present(nil)
	if err != nil {
		return failed("set up address translation", err)
	}
	r, err := c.attach(ctx, dir, spec, asked, translated)
	for range askAgain {
		if !errors.Is(err, endpoint.ErrLate) {
			break
		}
		r, err = c.attach(ctx, dir, spec, c.inquire(), translated)
	}
	if err != nil {
		return failed("attach container", err)
	}
	if err = c.awaitPolicy(dir, r); err == nil {
		err = c.print(c.answer(r))
	}
	if err != nil {
		return errors.Join(err, c.detach(ctx, dir, r.Key, nil))
	}
	return nil
}

// fresh is how long the daemon's word counts, from when it was asked: until then it gives nobody else's subnet to new containers.
// (After a lost lease it waits for 5 s before it looks for the last container and takes another subnet.)
const fresh = 3 * time.Second

// askAgain bounds how often it is asked anew in one ADD.
const askAgain = 8

// attach wires the container as the host says that it has to be. endpoint.ErrLate: it has to be asked again.
func (c *call) attach(ctx context.Context, dir *endpoint.Dir, spec endpoint.Spec, asked *inquiry, translated bool) (endpoint.Record, error) {
	defer asked.drop()
	if asked != nil {
		spec.Until = asked.at.Add(fresh)
	}
	spec.Ask = func() (subnet netip.Prefix, mtu int, err error) {
		n, err := c.discover(asked)
		if err != nil {
			return subnet, 0, failed("discover network info", err)
		}
		if err := c.admit(n); err != nil {
			return subnet, 0, err
		}
		if !translated || !n.ours() { // our daemon keeps right what is there
			if err := c.translate(ctx, n); err != nil {
				return subnet, 0, failed("set up address translation", err)
			}
		}
		return n.subnet, n.mtu, nil
	}
	return dir.Attach(ctx, spec, func(r endpoint.Record) error {
		if err := c.policyReady(); err != nil { // somebody may have removed the table since
			return err
		}
		if err := c.storePut(ctx, r); err != nil {
			c.leaveStore(ctx, r) // it may be in all the same
			return failed("write container metadata", err)
		}
		if err := c.metadataPut(ctx, r); err != nil {
			c.leaveStore(ctx, r)
			return failed("store add", err)
		}
		return nil
	})
}

// spec returns what the runtime wants, without what the host decides.
func (c *call) spec() (endpoint.Spec, error) {
	s := endpoint.Spec{Key: c.key(), Path: c.netns}
	if !isNull(c.cfg.Metadata) {
		s.Metadata = c.cfg.Metadata
	}
	if !isNull(c.cfg.RuntimeConfig.NetOutRules) {
		s.NetOut = c.cfg.RuntimeConfig.NetOutRules
	}
	var err error
	if s.PortMaps, err = c.cfg.portMaps(); err != nil {
		return s, failed("read port mappings", err)
	}
	if s.Limits, err = c.cfg.limits(); err != nil {
		return s, failed("read limits", err)
	}
	if s.Group, err = c.group(); err != nil {
		return s, err
	}
	if s.Advertise, err = c.advertisement(s.Group); err != nil {
		return s, err
	}
	s.TLS = c.cfg.tls
	s.Requested, err = c.requested()
	return s, err
}

func (c *call) key() endpoint.Key {
	return endpoint.Key{Network: c.cfg.Name, Container: c.container, Interface: c.ifname}
}

// admit refuses new containers on a host that cannot have them now.
func (c *call) admit(n network) error {
	switch n.status {
	case statusFenced:
		return &failure{code: codeTryAgain, msg: "host is fenced", err: errors.New(n.reason), hint: "the host's subnet was given to another host: it takes a new one when its last container has gone"}
	case statusStarting:
		return &failure{code: codeTryAgain, msg: "host has no lease", err: errors.New(n.reason), hint: "see why silk-daemon cannot reach silk-controller"}
	}
	return c.policyReady()
}

// policyTable is what the policy agent makes as its first act and never removes: while it is there, traffic of a new
// container is refused until a rule allows it. Two of its chains judge what passes, if they have rules.
const policyTable = "silk-policy"

// policyReady refuses to go on when the container would be open because the policy agent has not run.
func (c *call) policyReady() error {
	if !c.cfg.policyRequired() {
		return nil
	}
	there, err := kernel.HasTable(nil, policyTable, "forward", "input")
	if err == nil && !there {
		err = fmt.Errorf("nft table inet %s is absent, empty or dormant", policyTable)
	}
	if err != nil {
		return &failure{code: codeTryAgain, msg: "policy is required and not in force", err: err, hint: "start vxlan-policy-agent, or set policy to none"}
	}
	return nil
}

// translate makes sure that the container's traffic can leave the host.
func (c *call) translate(ctx context.Context, n network) error {
	no := c.cfg.noMasquerade
	if len(no) == 0 && n.overlay.IsValid() {
		no = []netip.Prefix{n.overlay}
	}
	return nat.Ensure(ctx, nil, nat.Config{Local: []netip.Prefix{n.subnet}, NoMasquerade: no, VTEP: n.vtep})
}
