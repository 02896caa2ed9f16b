package policyhttp

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/policy"
)

// ClientOptions are what a Client does not need to be told. Zero values mean the defaults.
type ClientOptions struct {
	Timeout     time.Duration                             // of one request, connecting included; default 5 s
	Wait        time.Duration                             // of a Watch on top of Timeout; whole seconds, default MaxWait, which is the most
	Poll        time.Duration                             // between two looks at a server without a watch; default 5 s
	PollGroups  time.Duration                             // between two looks at the security groups of such a server; default 60 s
	Again       time.Duration                             // after which a server without a watch is asked whether it has one now; default 1 min
	Token       func(ctx context.Context) (string, error) // of a person, without "bearer"; nil: the certificate is enough
	Traceparent string                                    // sent with each request as the header of that name (W3C Trace Context); may be empty
}

// Client speaks to policy-servers: as one of the people it is a policy.Book over the external API, as a host's agent a policy.Feed over the
// internal one, with the watch or, against a server of the deployed kind, by polling. It is safe for concurrent use.
//
// With several servers it stays with one until that is fault.Unavailable, then takes the next; each is asked at most once in a call. A server
// that cannot be reached or does not answer in time is fault.Unavailable, one that failed fault.Internal, and credentials that it does not
// accept fault.Denied. An error that came as an answer holds a *httpjson.StatusError.
type Client struct {
	o       ClientOptions
	http    *http.Client
	servers []*server

	mu   sync.Mutex
	turn int // of servers: the one to ask
}

// server is one policy-server, and what a feed knows of it.
type server struct {
	api httpjson.Client

	mu     sync.Mutex
	knows  setID     // the set that it was sent last
	old    time.Time // until then it counts as one without a watch
	polled polled    // what it last answered to polling
}

// NewClient returns a client of the policy-servers at urls, at least one ("https://policy-server:4003"). It opens no connection. tc is usually
// service.Certificates.Client, or nil; the client keeps a copy with a cache of TLS sessions.
func NewClient(urls []string, tc *tls.Config, o ClientOptions) *Client {
	o.Timeout, o.Poll, o.Again = orDefault(o.Timeout, 5*time.Second), orDefault(o.Poll, 5*time.Second), orDefault(o.Again, time.Minute)
	o.PollGroups = orDefault(o.PollGroups, 60*time.Second)
	o.Wait = min(max(orDefault(o.Wait, MaxWait).Truncate(time.Second), time.Second), MaxWait)
	if tc = tc.Clone(); tc != nil && tc.ClientSessionCache == nil {
		tc.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	}
	// A connection that waits says nothing for as long as a watch lasts: probes before that would be most of an idle fleet's traffic.
	// And when a whole fleet comes at once, a handshake takes its time.
	tr := &http.Transport{
		TLSClientConfig: tc, TLSHandshakeTimeout: max(o.Timeout, 20*time.Second), IdleConnTimeout: 30 * time.Second, MaxIdleConnsPerHost: 2,
		DialContext:        (&net.Dialer{Timeout: o.Timeout, KeepAlive: MaxWait + 15*time.Second}).DialContext,
		DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
	}
	c := &Client{o: o, http: &http.Client{
		Transport:     &credentials{tr, &o},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	for _, u := range urls {
		c.servers = append(c.servers, &server{api: httpjson.Client{Base: strings.TrimSuffix(u, "/"), HTTP: c.http}})
	}
	return c
}

// Close closes connections that are not in use.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// credentials adds what every request carries.
type credentials struct {
	*http.Transport
	o *ClientOptions
}

// RoundTrip implements http.RoundTripper.
func (t *credentials) RoundTrip(r *http.Request) (*http.Response, error) {
	body := r.Body
	r = r.Clone(r.Context())
	if t.o.Token != nil {
		token, err := t.o.Token(r.Context())
		if err != nil {
			if body != nil {
				body.Close()
			}
			return nil, fmt.Errorf("token: %w", err)
		}
		r.Header.Set("Authorization", "bearer "+token)
	}
	if t.o.Traceparent != "" {
		r.Header.Set("Traceparent", t.o.Traceparent)
	}
	// Twice is the same as once for all that we ask: so what meets a connection that the server has just closed may be sent on another. Without a
	// value the header is not sent.
	r.Header["X-Idempotency-Key"] = nil
	return t.Transport.RoundTrip(r)
}

var (
	_ policy.Book = (*Client)(nil)
	_ policy.Feed = (*Client)(nil)
)

// try asks the server whose turn it is, and while that is unavailable the others.
func (c *Client) try(ctx context.Context, ask func(s *server) error) error {
	if len(c.servers) == 0 {
		return fault.Unavailablef("there is no policy-server to ask")
	}
	c.mu.Lock()
	first := c.turn
	c.mu.Unlock()
	var errs []error
	for i := range c.servers {
		n := (first + i) % len(c.servers)
		err := ask(c.servers[n])
		if !errors.Is(err, fault.Unavailable) || ctx.Err() != nil {
			c.mu.Lock()
			c.turn = n
			c.mu.Unlock()
			return err
		}
		errs = append(errs, err)
	}
	c.mu.Lock() // another time, another server
	c.turn = (first + 1) % len(c.servers)
	c.mu.Unlock()
	return errors.Join(errs...)
}

// call asks for an answer that comes at once.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	return c.try(ctx, func(s *server) error {
		ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
		defer cancel()
		return s.api.Do(ctx, method, path, in, out)
	})
}

// sortRules sorts rules and leaves each policy in once.
func sortRules(rs []policy.Rule) []policy.Rule {
	slices.SortStableFunc(rs, func(a, b policy.Rule) int { return policy.Compare(a.Policy, b.Policy) })
	return slices.CompactFunc(rs, func(a, b policy.Rule) bool { return a.Policy == b.Policy })
}
