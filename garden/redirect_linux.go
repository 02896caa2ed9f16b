package garden

import (
	"context"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/nat"
)

// redirect has the container's connections end at a proxy in it, if the configuration says so.
func (n *networker) redirect() error {
	r := n.redirection()
	if !r.To.IsValid() && !r.Incoming {
		return nil
	}
	return n.setRedirect(r)
}

// unredirect takes that back.
func (n *networker) unredirect(context.Context) error {
	if r := n.redirection(); !r.To.IsValid() && !r.Incoming {
		return nil
	}
	return n.setRedirect(nat.Redirect{})
}

func (n *networker) setRedirect(r nat.Redirect) error {
	ns, err := kernel.OpenNS(n.netns())
	if err != nil {
		return err
	}
	defer ns.Close()
	return nat.SetRedirect(ns, r)
}
