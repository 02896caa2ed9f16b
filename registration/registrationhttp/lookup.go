package registrationhttp

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/registration"
)

// LookupOptions are what a Lookup does not need to be told. Zero values mean the defaults.
type LookupOptions struct {
	Timeout time.Duration // of a look-up with all its tries; default 4 s: who waits for a name gives up after 5 s
	Try     time.Duration // of one try, connecting included; default 1.5 s

	// Hosts returns the addresses of a server's host; default net.DefaultResolver.
	Hosts func(ctx context.Context, host string) ([]netip.Addr, error)
}

// Lookup asks service-discovery controllers, deployed ones or ours, for addresses. It goes to the next address of a server, and to the
// next server, when one cannot be reached, is not warm or answers what makes no sense, and begins again until time is up. Who answered
// last is asked first. It is safe for concurrent use.
type Lookup struct {
	servers []*server
	o       LookupOptions
	good    atomic.Pointer[target] // who answered last
}

// server is one that is configured. Its name may stand for several.
type server struct {
	scheme, host, port string
	name               bool // host is a name
	api                *http.Client
	hosts              func(ctx context.Context, host string) ([]netip.Addr, error)
	try                time.Duration // that hosts may take

	mu        sync.Mutex
	addrs     []netip.Addr
	when      time.Time // addrs were asked for
	resolving bool
}

// target is one address of a server.
type target struct {
	server *server
	at     string // host and port
}

const (
	hostsHold   = 10 * time.Second // that addresses of a server's host are good for
	firstPause  = 50 * time.Millisecond
	lastPause   = 500 * time.Millisecond
	maxAnswer   = 4 << 20 // bytes of an answer: some ten thousand addresses
	idlePerHost = 50
)

var errNobody = errors.New("no server could be asked")

// NewLookup returns a client of servers such as "https://service-discovery-controller.service.cf.internal:8054". It opens no connection.
// tc is usually service.Certificates.Client; each server's certificate is verified for its host as it is written here.
func NewLookup(servers []string, tc *tls.Config, o LookupOptions) (*Lookup, error) {
	if o.Timeout <= 0 {
		o.Timeout = 4 * time.Second
	}
	if o.Try <= 0 {
		o.Try = 1500 * time.Millisecond
	}
	if o.Hosts == nil {
		o.Hosts = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	l := &Lookup{o: o}
	for _, s := range servers {
		u, err := url.Parse(s)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" ||
			u.User != nil {
			return nil, fault.Invalidf("server %.200q: expected such as https://service-discovery-controller.service.cf.internal:8054", s)
		}
		l.servers = append(l.servers, newServer(u, tc, o))
	}
	if len(l.servers) == 0 {
		return nil, fault.Invalidf("no servers to look names up at: expected at least one")
	}
	return l, nil
}

func newServer(u *url.URL, tc *tls.Config, o LookupOptions) *server {
	s := &server{scheme: u.Scheme, host: u.Hostname(), port: u.Port(), hosts: o.Hosts, try: o.Try}
	if s.port == "" {
		s.port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	_, err := netip.ParseAddr(s.host)
	s.name = err != nil
	if tc = tc.Clone(); tc != nil {
		tc.ServerName = s.host
		if tc.ClientSessionCache == nil {
			tc.ClientSessionCache = tls.NewLRUClientSessionCache(16)
		}
	}
	s.api = &http.Client{
		Transport: &named{host: u.Host, Transport: &http.Transport{
			DialContext:     (&net.Dialer{Timeout: o.Try, KeepAlive: 15 * time.Second}).DialContext,
			TLSClientConfig: tc, TLSHandshakeTimeout: o.Try, MaxIdleConnsPerHost: idlePerHost, IdleConnTimeout: 90 * time.Second,
			DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return s
}

// named sends requests for an address as those for the host.
type named struct {
	*http.Transport
	host string
}

// RoundTrip implements http.RoundTripper.
func (t *named) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Host = t.host
	return t.Transport.RoundTrip(r)
}

// Close closes connections that are not in use.
func (l *Lookup) Close() {
	for _, s := range l.servers {
		s.api.CloseIdleConnections()
	}
}

// Resolve is a Resolve. The addresses are shuffled. When no server can say until the time is up, the error is fault.Unavailable with what
// the last whole round of tries met.
func (l *Lookup) Resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	n, err := registration.ParseName(name)
	if err != nil {
		return nil, nil // no registration can have it, nor may it become another request
	}
	ctx, cancel := context.WithTimeout(ctx, l.o.Timeout)
	defer cancel()
	pause := firstPause
	var met error // in the last round that was not cut short
	for {
		addrs, err := l.round(ctx, n)
		if err == nil {
			shuffle(addrs)
			return addrs, nil
		}
		if met == nil || ctx.Err() == nil {
			met = err
		}
		select {
		case <-ctx.Done():
			return nil, fault.New(fault.Unavailable, fmt.Errorf("look up %s: %w", n, errors.Join(ctx.Err(), met)))
		case <-time.After(pause/2 + rand.N(pause/2)):
		}
		pause = min(2*pause, lastPause)
	}
}

// round asks one target after another until one answers.
func (l *Lookup) round(ctx context.Context, name registration.Name) ([]netip.Addr, error) {
	var errs []error
	good := l.good.Load()
	if good != nil {
		addrs, err := l.try(ctx, *good, name)
		if err == nil {
			return addrs, nil
		}
		errs = append(errs, err)
	}
	first := rand.IntN(len(l.servers)) // not all clients ask the same one
	for i := range l.servers {
		targets, err := l.servers[(first+i)%len(l.servers)].targets(ctx)
		if err != nil {
			errs = append(errs, err)
		}
		for _, t := range targets {
			if good != nil && t == *good || ctx.Err() != nil {
				continue
			}
			addrs, err := l.try(ctx, t, name)
			if err == nil {
				l.good.Store(&t)
				return addrs, nil
			}
			errs = append(errs, err)
		}
	}
	return nil, cmp.Or(errors.Join(errs...), ctx.Err(), errNobody)
}

func (l *Lookup) try(ctx context.Context, t target, name registration.Name) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, l.o.Try)
	defer cancel()
	api := httpjson.Client{Base: t.server.scheme + "://" + t.at, HTTP: t.server.api, Limit: maxAnswer}
	var answer json.RawMessage
	if err := api.Do(ctx, http.MethodGet, PathRegistration+url.PathEscape(string(name)), nil, &answer); err != nil {
		return nil, err
	}
	addrs, err := decodeHosts(answer)
	if err != nil {
		return nil, fmt.Errorf("answer of %s: %w", t.at, err)
	}
	return addrs, nil
}

// targets returns the addresses of a server, shuffled. Those of before are better than none.
func (s *server) targets(ctx context.Context) ([]target, error) {
	if !s.name {
		return []target{{s, net.JoinHostPort(s.host, s.port)}}, nil
	}
	addrs, err := s.resolve(ctx)
	list := make([]target, len(addrs))
	for i, a := range addrs {
		list[i] = target{s, net.JoinHostPort(a.Unmap().String(), s.port)}
	}
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list, err
}

func (s *server) resolve(ctx context.Context) ([]netip.Addr, error) {
	s.mu.Lock()
	known := s.addrs
	if len(known) > 0 && (s.resolving || time.Since(s.when) < hostsHold) {
		s.mu.Unlock()
		return known, nil
	}
	s.resolving = true
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, s.try)
	defer cancel()
	addrs, err := s.hosts(ctx, s.host)
	if err == nil && len(addrs) == 0 {
		err = errors.New("it has no addresses")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resolving = false
	if err != nil {
		err = fmt.Errorf("find server %s: %w", s.host, err)
		return s.addrs, err
	}
	s.addrs, s.when = addrs, time.Now()
	return addrs, nil
}

// decodeHosts reads an answer to a look-up. An address that is none is passed over, unless there is nothing else; an answer without a
// list is no answer.
func decodeHosts(b []byte) ([]netip.Addr, error) {
	var answer struct {
		Hosts []struct {
			Address string `json:"ip_address"`
		} `json:"hosts"`
	}
	if err := json.Unmarshal(b, &answer); err != nil {
		return nil, err
	}
	if answer.Hosts == nil {
		return nil, errors.New("it has no list of hosts")
	}
	addrs := make([]netip.Addr, 0, len(answer.Hosts))
	for _, h := range answer.Hosts {
		if a, err := netip.ParseAddr(h.Address); err == nil && a.Zone() == "" {
			addrs = append(addrs, a.Unmap())
		}
	}
	if len(addrs) == 0 && len(answer.Hosts) > 0 {
		return nil, fmt.Errorf("none of its %d hosts has an IP address, the first has %.60q", len(answer.Hosts), strings.TrimSpace(answer.Hosts[0].Address))
	}
	return addrs, nil
}
