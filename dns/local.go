package dns

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/overlay"
)

// localCheck is the pause between two looks whether the host still has our addresses.
const localCheck = 2 * time.Second

// locals keeps link-local addresses of listen_dns on the host. They stay when the process ends, or a restart would be more than a moment without
// answers; silk-teardown removes them.
type locals struct {
	addresses []netip.Addr
	log       *slog.Logger

	mu  sync.Mutex
	err error // of the last look
}

// linkLocals returns which addresses of listen_dns are nobody's on any network, so that the host may have them.
func linkLocals(cfg Config) []netip.Addr {
	var out []netip.Addr
	for _, a := range addrPorts(cfg.ListenDNS) {
		if a.Addr().Is4() && a.Addr().IsLinkLocalUnicast() {
			out = append(out, a.Addr())
		}
	}
	return out
}

func (l *locals) loop() *reconcile.Loop {
	return &reconcile.Loop{Name: "local-address", Log: l.log, Resync: localCheck, Step: func(context.Context) error { l.hold(); return nil }}
}

// hold gives the host its addresses, and says once what keeps it from that.
func (l *locals) hold() {
	var err error
	for _, a := range l.addresses {
		if e := kernel.HoldLocal(nil, a, overlay.Protocol); e != nil {
			err = e
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil && l.err == nil {
		l.log.Error("host does not have the address that containers ask", "error", err)
	}
	if err == nil && l.err != nil {
		l.log.Info("host has the address that containers ask")
	}
	l.err = err
}

func (l *locals) trouble() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}
