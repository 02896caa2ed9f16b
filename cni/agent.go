package cni

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
)

// awaitPolicy waits until the policy agent has the container's rules in the kernel. Without an answer to that effect the container stays closed
// until the agent comes to it by itself, and that is no reason to fail: hosts start containers while nothing central is there. It is
// one only when the address still has the rules of a container that went while the agent was away.
func (c *call) awaitPolicy(dir *endpoint.Dir, r endpoint.Record) error {
	if !c.cfg.policyRequired() {
		return nil
	}
	// Names are safe in a URL: see endpoint.ValidID and badInterface.
	path := "/force-policy-poll-cycle?network=" + r.Network + "&container=" + r.Container + "&interface=" + escape(r.Interface)
	q, err := ask(c.cfg.policyAgent, path, time.Duration(c.cfg.PolicyTimeout)*time.Second)
	if err == nil {
		_, err = q.answer()
	}
	if err == nil {
		return nil
	}
	known, lerr := dir.Identities()
	if lerr != nil {
		return &failure{code: codeTryAgain, msg: "rules of the address are not known", err: errors.Join(lerr, err), hint: "start vxlan-policy-agent"}
	}
	for _, i := range known {
		if i.Address == r.Address() && !i.Is(r) {
			return &failure{code: codeTryAgain, msg: "address still has the rules of another container", hint: "start vxlan-policy-agent, or try again with another address",
				err: fmt.Errorf("%v is known as one of group %q: %w", r.Address(), i.Group, err)}
		}
	}
	c.warn("the container is closed until vxlan-policy-agent has made its rules: %v", err)
	return nil
}

// escape makes the name of an interface fit for a query. (net/url would add to the plugin's start.)
func escape(name string) string {
	var b strings.Builder
	for _, o := range []byte(name) {
		if o <= ' ' || o >= 0x7f || strings.IndexByte(`%&+#;?"<>`, o) >= 0 {
			fmt.Fprintf(&b, "%%%02X", o)
			continue
		}
		b.WriteByte(o)
	}
	return b.String()
}
