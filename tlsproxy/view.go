package tlsproxy

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/service"
)

// Health is the answer of /health of the debug listener: 200 while the program follows the records, also when some ports do not listen, and 503
// when it has not looked at them for a minute.
type Health struct {
	Status  string   `json:"status"` // ready or degraded
	Reasons []string `json:"reasons,omitempty"`
}

// EndpointStatus is one element of the answer of /status: how a container's ports stand.
type EndpointStatus struct {
	endpoint.Key
	Address     netip.Addr         `json:"address"`
	Group       string             `json:"policy_group"`
	Error       string             `json:"error,omitempty"` // why nothing listens
	Certificate *CertificateStatus `json:"certificate,omitempty"`
	Ports       []PortStatus       `json:"ports,omitempty"`
}

// CertificateStatus says what a container shows. Without a serial number it shows nothing.
type CertificateStatus struct {
	Serial  string    `json:"serial,omitempty"` // hexadecimal
	Names   []string  `json:"names,omitempty"`
	Expires time.Time `json:"expires,omitzero"`
	Error   string    `json:"error,omitempty"` // why there is none, why an earlier one is still shown, or why clients refuse it
}

// PortStatus says how one port stands. States are listening, taken (by a process of the container) and failed.
type PortStatus struct {
	Listen      uint16            `json:"listen"`
	Forward     uint16            `json:"forward"`
	State       string            `json:"state"`
	Error       string            `json:"error,omitempty"`
	Forwarded   string            `json:"forward_error,omitempty"` // of the last connection to the container's own port
	Connections int               `json:"connections"`
	Accepted    uint64            `json:"accepted"`
	Handshakes  uint64            `json:"handshakes"`
	Truncated   uint64            `json:"truncated,omitempty"`
	Refused     map[string]uint64 `json:"refused,omitempty"`
}

// maxTold bounds how many of many similar things are told.
const maxTold = 10

// stuckAfter is how long the records may go without a look.
const stuckAfter = time.Minute

// status returns how all containers stand, in the order of their addresses.
func (p *proxy) status() []EndpointStatus {
	p.mu.Lock()
	sites := make([]*site, 0, len(p.sites))
	for _, s := range p.sites {
		sites = append(sites, s)
	}
	list := make([]EndpointStatus, 0, len(p.sites)+len(p.failures))
	for k, err := range p.failures {
		list = append(list, EndpointStatus{Key: k, Error: err.Error()})
	}
	p.mu.Unlock()
	for _, s := range sites {
		list = append(list, s.status())
	}
	slices.SortFunc(list, func(a, b EndpointStatus) int {
		return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Key.String(), b.Key.String()))
	})
	return list
}

func (s *site) status() EndpointStatus {
	st := EndpointStatus{Key: s.record.Key, Address: s.record.Address(), Group: s.record.Group, Certificate: &CertificateStatus{}}
	c, err := s.proxy.certificates.inspect(s.record)
	if err != nil {
		st.Certificate.Error = err.Error()
	}
	if c != nil {
		leaf := c.pair.Leaf
		st.Certificate.Serial, st.Certificate.Names, st.Certificate.Expires = leaf.SerialNumber.Text(16), leaf.DNSNames, c.expires
		if why := outOfTime(leaf, time.Now()); why != "" {
			st.Certificate.Error = strings.TrimSuffix(why+": "+st.Certificate.Error, ": ")
		}
	}
	open := map[*port]int{}
	s.mu.Lock()
	for c := range s.conns {
		open[c.port]++
	}
	s.mu.Unlock()
	for _, p := range s.ports {
		st.Ports = append(st.Ports, p.status(open[p]))
	}
	return st
}

// outOfTime says why clients refuse a certificate that is shown all the same, "" if they do not.
func outOfTime(leaf *x509.Certificate, now time.Time) string {
	switch {
	case now.After(leaf.NotAfter):
		return "clients refuse it: it has expired"
	case now.Before(leaf.NotBefore):
		return "clients refuse it: it begins at " + leaf.NotBefore.UTC().Format(time.RFC3339) + ", or the clock of this host is wrong"
	}
	return ""
}

func (p *port) status(open int) PortStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := PortStatus{
		Listen: p.spec.Listen, Forward: p.spec.Forward, State: p.state(), Connections: open, Accepted: p.stats.accepted.Load(), Handshakes: p.stats.handshakes.Load(),
		Truncated: p.stats.truncated.Load(),
	}
	if p.failure != nil {
		st.Error = p.failure.Error()
	}
	if p.forwarded != nil {
		st.Forwarded = p.forwarded.Error()
	}
	for r := range reasons {
		if n := p.stats.refused[r].Load(); n > 0 {
			if st.Refused == nil {
				st.Refused = map[string]uint64{}
			}
			st.Refused[reason(r).String()] = n
		}
	}
	return st
}

// health returns how the program stands.
func (p *proxy) health() (h Health, alive bool) {
	st := p.follow.Stats()
	alive = !st.LastSuccess.IsZero() && time.Since(st.LastSuccess) < stuckAfter
	add := func(format string, args ...any) { h.Reasons = append(h.Reasons, fmt.Sprintf(format, args...)) }
	if st.LastError != nil {
		add("containers: %v", st.LastError)
	}
	p.mu.Lock()
	if p.bad > 0 {
		add("containers: %d records cannot be read", p.bad)
	}
	p.mu.Unlock()
	for _, e := range p.status() {
		if e.Error != "" {
			add("%v: %s", e.Key, e.Error)
		}
		if e.Certificate != nil && e.Certificate.Error != "" {
			add("%v: certificate: %s", e.Key, e.Certificate.Error)
		}
		for _, q := range e.Ports {
			if q.Error != "" {
				add("%v: %s", e.Key, q.Error)
			}
		}
	}
	if n := len(h.Reasons); n > maxTold {
		h.Reasons = append(h.Reasons[:maxTold:maxTold], fmt.Sprintf("%d more: see /status", n-maxTold))
	}
	h.Status = "ready"
	if len(h.Reasons) > 0 {
		h.Status = "degraded"
	}
	return h, alive
}

// debugHandler serves the debug listener.
func (p *proxy) debugHandler(level *slog.LevelVar) http.Handler {
	m := service.Debug(level)
	m.Handle("/metrics", p.metrics())
	m.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) {
		h, alive := p.health()
		status := http.StatusOK
		if !alive {
			status = http.StatusServiceUnavailable
		}
		httpjson.Write(w, status, h)
	})
	m.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) { httpjson.Write(w, http.StatusOK, p.status()) })
	return m
}
