package leasehttp

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/lease"
)

// Client is a lease.Registry that a controller serves, ours or a deployed one. It is safe for concurrent use and never
// retries by itself.
//
// A refusal of Renew is fault.Conflict, one of Acquire fault.Exhausted; a controller that cannot be reached, is overloaded
// or does not answer in time is fault.Unavailable, one that failed fault.Internal, and a certificate that may not speak
// for the host fault.Denied. An error that came as an answer holds a *httpjson.StatusError.
type Client struct {
	api     httpjson.Client
	timeout time.Duration
	wait    time.Duration
}

var _ lease.Registry = (*Client)(nil)

// ClientOptions are what a Client does not need to be told.
type ClientOptions struct {
	Timeout     time.Duration // of one request, connecting included; default 5 s
	Wait        time.Duration // of a Watch on top of Timeout; whole seconds, default 30 s, at least 1 s, at most MaxWait
	Traceparent string        // sent with each request as the header of that name (W3C Trace Context); may be empty
}

// NewClient returns a client of the controller at base ("https://silk-controller:4103"). It opens no connection. tc is
// usually service.Certificates.Client; the client keeps a copy with a cache of TLS sessions.
func NewClient(base string, tc *tls.Config, o ClientOptions) *Client {
	if o.Timeout <= 0 {
		o.Timeout = 5 * time.Second
	}
	if o.Wait <= 0 {
		o.Wait = 30 * time.Second
	}
	if tc = tc.Clone(); tc != nil && tc.ClientSessionCache == nil {
		tc.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	}
	// A host's connection that only renews is not worth its memory in the controller: it is closed soon after use and
	// resumed with a ticket.
	tr := &http.Transport{
		TLSClientConfig: tc, TLSHandshakeTimeout: o.Timeout, IdleConnTimeout: 10 * time.Second, MaxIdleConnsPerHost: 2,
		DialContext:        (&net.Dialer{Timeout: o.Timeout, KeepAlive: 15 * time.Second}).DialContext,
		DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
	}
	return &Client{
		api: httpjson.Client{Base: strings.TrimSuffix(base, "/"), HTTP: &http.Client{
			Transport:     &tracing{tr, o.Traceparent},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}},
		timeout: o.Timeout, wait: min(max(o.Wait.Truncate(time.Second), time.Second), MaxWait),
	}
}

// Close closes connections that are not in use.
func (c *Client) Close() { c.api.HTTP.CloseIdleConnections() }

// tracing adds the traceparent header.
type tracing struct {
	*http.Transport
	parent string
}

// RoundTrip implements http.RoundTripper.
func (t *tracing) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.parent != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Traceparent", t.parent)
	}
	return t.Transport.RoundTrip(r)
}

func (c *Client) put(ctx context.Context, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return c.api.Do(ctx, http.MethodPut, path, in, out)
}

// Acquire implements lease.Registry.
func (c *Client) Acquire(ctx context.Context, underlay netip.Addr, kind lease.Kind) (lease.Lease, error) {
	var w wireLease
	err := c.put(ctx, PathAcquire, acquireRequest{underlay.String(), kind == lease.Single}, &w)
	if se, ok := errors.AsType[*httpjson.StatusError](err); ok && se.Status == http.StatusConflict {
		err = fault.New(fault.Exhausted, se)
	}
	if err != nil {
		return lease.Lease{}, fmt.Errorf("acquire lease for %v: %w", underlay, err)
	}
	l, err := w.parse()
	if err == nil && l.Underlay != underlay {
		err = fmt.Errorf("it is the lease of %v", l.Underlay)
	}
	if err != nil {
		// Not fault.Invalid: it is the answer that is wrong, not what was asked.
		return lease.Lease{}, fmt.Errorf("acquire lease for %v: answer cannot be used: %v", underlay, err)
	}
	return l, nil
}

// Renew implements lease.Registry.
func (c *Client) Renew(ctx context.Context, l lease.Lease) error {
	if err := c.put(ctx, PathRenew, wireOf(l), nil); err != nil {
		return fmt.Errorf("renew lease %v: %w", l, err)
	}
	return nil
}

// Release implements lease.Registry.
func (c *Client) Release(ctx context.Context, underlay netip.Addr) error {
	if err := c.put(ctx, PathRelease, releaseRequest{underlay.String()}, nil); err != nil {
		return fmt.Errorf("release lease of %v: %w", underlay, err)
	}
	return nil
}

// Leases implements lease.Registry. With a *Partial error the leases returned are good but not all.
func (c *Client) Leases(ctx context.Context) ([]lease.Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var body json.RawMessage
	err := c.api.Do(ctx, http.MethodGet, PathLeases, nil, &body)
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	ls, err := decodeList(body)
	if err != nil {
		return ls, fmt.Errorf("list leases: %w", err)
	}
	return ls, nil
}

// Watch implements lease.Registry. A controller of the deployed kind cannot be watched: that is fault.NotFound, and Leases
// is what there is. With a *Partial error the update holds what could be read and does not add up to its seal.
func (c *Client) Watch(ctx context.Context, since lease.Revision) (lease.Update, error) {
	ctx, cancel := context.WithTimeout(ctx, c.wait+c.timeout)
	defer cancel()
	q := url.Values{"since": {since.String()}, "wait": {strconv.Itoa(int(c.wait / time.Second))}}
	var body json.RawMessage
	err := c.api.Do(ctx, http.MethodGet, PathWatch+"?"+q.Encode(), nil, &body)
	if err != nil {
		return lease.Update{}, fmt.Errorf("watch leases: %w", err)
	}
	u, err := decodeUpdate(body)
	if err != nil {
		return u, fmt.Errorf("watch leases: %w", err)
	}
	return u, nil
}
