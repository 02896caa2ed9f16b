// Package outbound is how policy-server asks other systems, such as UAA and Cloud Controller: every request has a timeout, a bounded number of
// tries and a bounded answer, over a bounded number of connections, and follows no redirect, which could carry a token elsewhere.
//
// It knows no system; policyserver/auth and policyserver/cc do.
//
// Use: c := outbound.New(tlsConfig, 5*time.Second, "uaa"); a, err := c.Ask(ctx, build).
package outbound

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

const (
	tries     = 3
	pause     = 100 * time.Millisecond // before the second try; doubled before the third
	maxAnswer = 32 << 20               // bytes
	maxConns  = 64                     // to one host; who finds all of them in use waits as for an answer
)

// Client asks one system. It is safe for concurrent use.
type Client struct {
	http    *http.Client
	timeout time.Duration
	name    string
}

// New returns a client of the system that errors call name. timeout is that of one try, connecting included.
func New(tc *tls.Config, timeout time.Duration, name string) *Client {
	return &Client{timeout: timeout, name: name, http: &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment, TLSClientConfig: tc, TLSHandshakeTimeout: timeout, IdleConnTimeout: 30 * time.Second, MaxIdleConnsPerHost: 8, MaxConnsPerHost: maxConns,
			DialContext: (&net.Dialer{Timeout: timeout}).DialContext, MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close closes connections that are not in use.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Answer is what came back: any status below 500 but 429.
type Answer struct {
	Status int
	Body   []byte
}

// Decode reads the body of a 200. Another status, and what is no JSON of that shape, is an error that is fault.Unavailable: the other system does
// not do what it is there for.
func (a Answer) Decode(into any) error {
	if a.Status != http.StatusOK {
		return fault.Unavailablef("answer is %d %.200q: expected 200", a.Status, a.Body)
	}
	if err := json.Unmarshal(a.Body, into); err != nil {
		return fault.Unavailablef("answer is not what was expected: %v", err)
	}
	return nil
}

// Ask sends the request that build makes, and again when the other system is not reached, does not answer in time, or answers 429 or 5xx.
// When no try succeeds the error is fault.Unavailable.
func (c *Client) Ask(ctx context.Context, build func(ctx context.Context) (*http.Request, error)) (Answer, error) {
	var errs []error
	for n := range tries {
		if n > 0 && !wait(ctx, pause<<(n-1)) {
			break
		}
		a, err := c.once(ctx, build)
		if err == nil {
			return a, nil
		}
		errs = append(errs, err)
		if !errors.Is(err, fault.Unavailable) || ctx.Err() != nil {
			break
		}
	}
	return Answer{}, fmt.Errorf("ask %s: %w", c.name, errs[len(errs)-1])
}

func (c *Client) once(ctx context.Context, build func(ctx context.Context) (*http.Request, error)) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	req, err := build(ctx)
	if err != nil {
		return Answer{}, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return Answer{}, fault.New(fault.Unavailable, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return Answer{}, fault.New(fault.Unavailable, fmt.Errorf("read answer of %s: %w", req.URL.Redacted(), err))
	case len(b) > maxAnswer:
		return Answer{}, fault.Unavailablef("answer of %s is longer than %d bytes", req.URL.Redacted(), maxAnswer)
	case resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests:
		return Answer{}, fault.Unavailablef("%s %s: answer is %d %.200q", req.Method, req.URL.Path, resp.StatusCode, bytes.TrimSpace(b))
	}
	return Answer{resp.StatusCode, b}, nil
}

// wait waits for half to all of d, or returns false when ctx has ended.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d/2 + rand.N(d/2+1))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Trust returns the TLS configuration that trusts the authorities in files: blank names and blank files are left out, and when all are blank
// the system's authorities are trusted. insecure trusts anybody and reads no file.
func Trust(insecure bool, files ...string) (*tls.Config, error) {
	tc := &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: insecure}
	if insecure {
		return tc, nil
	}
	for _, f := range files {
		if f == "" {
			continue
		}
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("read ca certificates: %w", err)
		}
		if len(bytes.TrimSpace(b)) == 0 {
			continue
		}
		if tc.RootCAs == nil {
			tc.RootCAs = x509.NewCertPool()
		}
		if !tc.RootCAs.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("read ca certificates: %s holds no certificate in PEM form", f)
		}
	}
	return tc, nil
}
