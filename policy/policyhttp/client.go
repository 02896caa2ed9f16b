package policyhttp

import (
	"context"
	"crypto/tls"
	"net/http"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// ClientOptions are what a Client does not need to be told. Zero values mean the defaults.
type ClientOptions struct {
	Timeout     time.Duration                             // of one request, connecting included; default 5 s
	Wait        time.Duration                             // of a Watch on top of Timeout; whole seconds, default MaxWait, which is the most
	Poll        time.Duration                             // between two looks at a server without a watch; default 5 s
	Token       func(ctx context.Context) (string, error) // of a person, without "bearer"; nil: the certificate is enough
	Traceparent string                                    // sent with each request as the header of that name (W3C Trace Context); may be empty
}

// Client speaks to policy-servers: as one of the people it is a policy.Book over the external API, as a host's agent a policy.Feed over the
// internal one, with the watch or, against a server of the deployed kind, by polling. It is safe for concurrent use.
//
// With several servers it stays with one until that fails, then takes the next; it does not repeat a request by itself. A server
// that cannot be reached or does not answer in time is fault.Unavailable, one that failed fault.Internal, and credentials that it does not
// accept fault.Denied. An error that came as an answer holds a *httpjson.StatusError.
type Client struct {
	servers []string
	http    *http.Client
	o       ClientOptions
}

// NewClient returns a client of the policy-servers at urls, at least one ("https://policy-server:4003"). It opens no connection. tc is usually
// service.Certificates.Client, or nil; the client keeps a copy with a cache of TLS sessions.
func NewClient(urls []string, tc *tls.Config, o ClientOptions) *Client {
	return &Client{servers: urls, o: o}
}

// Close closes connections that are not in use.
func (c *Client) Close() {}

var (
	_ policy.Book = (*Client)(nil)
	_ policy.Feed = (*Client)(nil)
)

// Create implements policy.Book.
func (c *Client) Create(ctx context.Context, ps []policy.Policy) error { return nil }

// Delete implements policy.Book.
func (c *Client) Delete(ctx context.Context, ps []policy.Policy) error { return nil }

// List implements policy.Book.
func (c *Client) List(ctx context.Context, f policy.Filter) ([]policy.Policy, error) { return nil, nil }

// CreateInForce is Create that then waits, at most for the given time, until the policies are in force. Force.Complete of its answer
// tells whether they are.
func (c *Client) CreateInForce(ctx context.Context, ps []policy.Policy, wait time.Duration) (Force, error) {
	return Force{}, nil
}

// DeleteInForce is Delete that then waits, at most for the given time, until the policies are no longer in force.
func (c *Client) DeleteInForce(ctx context.Context, ps []policy.Policy, wait time.Duration) (Force, error) {
	return Force{}, nil
}

// Tags returns the groups that have a tag, by tag; only an admin may ask.
func (c *Client) Tags(ctx context.Context) ([]identity.Tagged, error) { return nil, nil }

// WhoAmI returns the name by which the server knows the caller.
func (c *Client) WhoAmI(ctx context.Context) (string, error) { return "", nil }

// Watch implements policy.Feed. Rules of the answer that cannot be used are left out and named by a *Partial error beside the
// update, whose seal then is that of the rules that are left: it may be applied.
func (c *Client) Watch(ctx context.Context, a policy.Ask) (policy.Update, error) {
	return policy.Update{}, nil
}

// Tag implements policy.Feed.
func (c *Client) Tag(ctx context.Context, g identity.Group, kind string) (identity.Tag, error) {
	return 0, nil
}
