package authorityhttp

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
)

// maxAnswer bounds an answer in bytes: authority.MaxChain roots of 8192 bits have some 200 KiB.
const maxAnswer = 1 << 20

// Client asks a controller. It is safe for concurrent use and never retries by itself.
//
// A controller that has no root is fault.NotFound, one that cannot be reached, or whose root, database or patience is at an end, fault.Unavailable;
// a certificate that does not speak for the host, and a host without a lease, are fault.Denied.
type Client struct {
	api     httpjson.Client
	timeout time.Duration
}

// ClientOptions are what a Client does not need to be told.
type ClientOptions struct {
	Timeout time.Duration // of one request, connecting included; default 10 s
}

// NewClient returns a client of the controller at base ("https://silk-controller:4103"). It opens no connection. tc is usually
// service.Certificates.Client.
func NewClient(base string, tc *tls.Config, o ClientOptions) *Client {
	if o.Timeout <= 0 {
		o.Timeout = 10 * time.Second
	}
	tr := &http.Transport{ // a host asks once an hour: no connection is worth keeping
		TLSClientConfig: tc.Clone(), TLSHandshakeTimeout: o.Timeout, IdleConnTimeout: 10 * time.Second, MaxIdleConnsPerHost: 1,
		DialContext:        (&net.Dialer{Timeout: o.Timeout}).DialContext,
		DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
	}
	return &Client{timeout: o.Timeout, api: httpjson.Client{Base: strings.TrimSuffix(base, "/"), Limit: maxAnswer, HTTP: &http.Client{
		Transport:     tr,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}}
}

// Close closes connections that are not in use.
func (c *Client) Close() { c.api.HTTP.CloseIdleConnections() }

// Intermediate asks for an intermediate of a host for the key of a certificate request in PEM form (authority.NewRequest). Whether the answer
// is what was asked for is for authority.NewIntermediate to say.
func (c *Client) Intermediate(ctx context.Context, host netip.Addr, csr []byte) (Grant, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var a answer
	err := c.api.Do(ctx, http.MethodPost, PathIntermediate, request{host.String(), string(csr)}, &a)
	var g Grant
	if err == nil {
		g, err = a.grant()
	}
	if err != nil {
		return Grant{}, fmt.Errorf("ask for an intermediate: %w", err)
	}
	return g, nil
}

// Roots asks what to trust.
func (c *Client) Roots(ctx context.Context) (authority.Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	b, err := c.roots(ctx)
	if err != nil {
		return authority.Bundle{}, fmt.Errorf("ask for the roots: %w", err)
	}
	return b, nil
}

func (c *Client) roots(ctx context.Context) (authority.Bundle, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.api.Base+PathRoots, nil)
	if err != nil {
		return authority.Bundle{}, fault.New(fault.Invalid, err)
	}
	resp, err := c.api.HTTP.Do(req)
	if err != nil {
		return authority.Bundle{}, fault.New(fault.Unavailable, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return authority.Bundle{}, fault.New(fault.Unavailable, err)
	case resp.StatusCode != http.StatusOK:
		return authority.Bundle{}, fault.New(httpjson.Kind(resp.StatusCode), fmt.Errorf("http status %d: %.200q", resp.StatusCode, text))
	case len(text) > maxAnswer:
		return authority.Bundle{}, fmt.Errorf("answer is longer than %d bytes", maxAnswer)
	}
	b, err := authority.ParseBundle(text)
	if err != nil {
		return authority.Bundle{}, fmt.Errorf("answer cannot be used: %v", err)
	}
	return b, nil
}
