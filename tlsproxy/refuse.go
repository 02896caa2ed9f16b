package tlsproxy

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// reason is why a connection was refused.
type reason int

const (
	crowded          reason = iota // the container, its client or the host has too many connections
	hurried                        // too many handshakes are unfinished
	noCertificate                  // there is none to show
	slow                           // the handshake took too long
	garbled                        // the handshake failed
	badClient                      // the client's certificate is missing, or none of the authority's
	foreignAddress                 // the client's certificate is for another address
	foreignGroup                   // the client's certificate is of another group than its connection
	unknownGroup                   // nobody could tell the group of the client's connection
	unreachable                    // the container does not take the connection
	reasons          int    = iota
	refusalLogPeriod        = time.Minute // between two lines about the same
)

var reasonNames = [reasons]string{"connections", "handshakes", "no_certificate", "timeout", "handshake", "client_certificate", "client_address", "client_group",
	"client_unknown", "unreachable"}

// String returns the reason as metrics have it.
func (r reason) String() string { return reasonNames[r] }

// remedies say what to do.
var remedies = [reasons]string{
	crowded:        "look for a client that leaves connections open, or raise max_connections and max_connections_per_container",
	hurried:        "look for a client that begins connections and does not go on",
	noCertificate:  "see certificate in /status",
	badClient:      "give the client a certificate that leads to the authority of client_ca_file, or to that of the hosts",
	foreignAddress: "the client must show a certificate with its own address among the IP addresses of its alternative names",
	foreignGroup:   "the client must show its own certificate: the policy agent says that its connection is another group's",
	unknownGroup:   "see that the policy agent runs and that its policies allow the connection by group",
	unreachable:    "see that the application listens on the port",
}

// refused is an error with its reason.
type refused struct {
	reason reason
	err    error
}

func (r *refused) Error() string { return r.err.Error() }
func (r *refused) Unwrap() error { return r.err }

func refusal(r reason, err error) error { return &refused{r, err} }

func refusalf(r reason, format string, args ...any) error {
	return &refused{r, fmt.Errorf(format, args...)}
}

// handshakeError gives an error of a handshake its reason.
func handshakeError(err error) error {
	var r *refused
	switch {
	case errors.As(err, &r):
		return err
	case errors.Is(err, os.ErrDeadlineExceeded):
		return refusal(slow, err)
	}
	return refusal(garbled, err)
}

// figures count what happens at a port. They are read while they change.
type figures struct {
	accepted   atomic.Uint64 // connections
	handshakes atomic.Uint64 // that succeeded
	resumed    atomic.Uint64 // of these
	received   atomic.Uint64 // bytes for the container
	sent       atomic.Uint64 // bytes for clients
	truncated  atomic.Uint64 // connections that clients ended without a word
	refused    [reasons]atomic.Uint64
}

// add adds what f counts to sum.
func (f *figures) add(sum *figures) {
	sum.accepted.Add(f.accepted.Load())
	sum.handshakes.Add(f.handshakes.Load())
	sum.resumed.Add(f.resumed.Load())
	sum.received.Add(f.received.Load())
	sum.sent.Add(f.sent.Load())
	sum.truncated.Add(f.truncated.Load())
	for i := range f.refused {
		sum.refused[i].Add(f.refused[i].Load())
	}
}

// complaints says of each reason at most once a minute that connections are refused for it.
type complaints struct {
	mu    sync.Mutex
	said  [reasons]time.Time
	since [reasons]int // refused without a line
}

// say logs a refusal, if its reason's turn has come. What peers can cause at will is for people who look for it.
func (c *complaints) say(log *slog.Logger, r reason, err error, attrs ...any) {
	c.mu.Lock()
	now := time.Now()
	due := c.said[r].IsZero() || now.Sub(c.said[r]) >= refusalLogPeriod
	more := c.since[r]
	if due {
		c.said[r], c.since[r] = now, 0
	} else {
		c.since[r]++
	}
	c.mu.Unlock()
	if !due {
		return
	}
	attrs = append(attrs, "reason", r, "error", err, "others_since", more)
	if remedies[r] == "" {
		log.Debug("connection refused", attrs...)
		return
	}
	log.Warn("connection refused", append(attrs, "remedy", remedies[r])...)
}
