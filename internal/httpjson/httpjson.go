// Package httpjson is how Silk's programs speak JSON over HTTP: one table from fault kinds to statuses used in both
// directions, bounded bodies, admission, and a client with timeouts and bounded answers.
//
// It knows routes and types of nobody; leasehttp and its siblings say what is served.
package httpjson

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// statuses is the one table between kinds and HTTP. Where two kinds share a status, the first is what a client reads.
var statuses = []struct {
	kind   fault.Kind
	status int
}{
	{fault.Invalid, http.StatusBadRequest},
	{fault.NotFound, http.StatusNotFound},
	{fault.Conflict, http.StatusConflict},
	{fault.Exhausted, http.StatusConflict},
	{fault.Denied, http.StatusForbidden},
	{fault.Unavailable, http.StatusServiceUnavailable},
	{fault.Internal, http.StatusInternalServerError},
}

// Status returns the HTTP status of a kind.
func Status(k fault.Kind) int {
	for _, s := range statuses {
		if s.kind == k {
			return s.status
		}
	}
	return http.StatusInternalServerError
}

// Kind returns what a status that is not a success means to a client.
func Kind(status int) fault.Kind {
	switch status {
	case http.StatusUnauthorized:
		return fault.Denied
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusGatewayTimeout:
		return fault.Unavailable
	}
	for _, s := range statuses {
		if s.status == status {
			return s.kind
		}
	}
	if status/100 == 4 {
		return fault.Invalid
	}
	return fault.Internal
}

// Body is the shape of every error answer.
type Body struct {
	Error string `json:"error"`
}

// Write sends v as JSON with the given status.
func Write(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		status, b = http.StatusInternalServerError, []byte(`{"error": "encode answer"}`)
	}
	writeBytes(w, status, b)
}

// WriteError sends the error body {"error": "text"} as the deployed servers spell it, with one space, but always as valid JSON.
func WriteError(w http.ResponseWriter, status int, text string) {
	b, err := json.Marshal(text)
	if err != nil {
		b = []byte(`"encode answer"`)
	}
	writeBytes(w, status, slices.Concat([]byte(`{"error": `), b, []byte{'}'}))
}

func writeBytes(w http.ResponseWriter, status int, b []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	w.Write(b)
}

// Admit lets at most n requests into next at a time and answers 503 with Retry-After to those that have
// waited for wait without a place.
func Admit(n int, wait time.Duration, next http.Handler) http.Handler {
	return AdmitTo(make(chan struct{}, n), wait, next)
}

// AdmitTo is Admit for handlers that share their places: cap(places) requests are served at a time.
func AdmitTo(places chan struct{}, wait time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if Enter(places, wait, w, r) {
			defer func() { <-places }()
			next.ServeHTTP(w, r)
		}
	})
}

// Enter takes a place, which the caller gives back by receiving from places. Without one after wait it answers the request as Admit does and returns false.
func Enter(places chan struct{}, wait time.Duration, w http.ResponseWriter, r *http.Request) bool {
	select {
	case places <- struct{}{}:
		return true
	default:
		return queue(places, wait, w, r)
	}
}

// queue waits for a place; without one it answers the request and returns false. It is a function of its own so that
// requests that are served for long do not keep its variables on their stacks.
//
//go:noinline
func queue(places chan struct{}, wait time.Duration, w http.ResponseWriter, r *http.Request) bool {
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case places <- struct{}{}:
		return true
	case <-r.Context().Done():
	case <-t.C:
	}
	w.Header().Set("Retry-After", "1")
	WriteError(w, http.StatusServiceUnavailable, "too many requests at once: try again later")
	return false
}

// Client calls a JSON API. It is safe for concurrent use.
type Client struct {
	Base  string // "https://controller:4103", without a final slash
	HTTP  *http.Client
	Limit int64 // of an answer in bytes; default 64 MiB
}

// Do sends in (nil for none) and decodes a 2xx answer into out (nil for none). A server that cannot be reached or does not
// answer in time is fault.Unavailable; other statuses are what Kind makes of them, with the server's error text.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.Base+path, body)
	if err != nil {
		return fault.New(fault.Invalid, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("Accept", "application/json")
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return fault.New(fault.Unavailable, err)
	}
	defer resp.Body.Close()
	limit := c.Limit
	if limit == 0 {
		limit = 64 << 20
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	switch {
	case err != nil:
		return fault.New(fault.Unavailable, fmt.Errorf("%s %s: read answer: %w", method, path, err))
	case int64(len(b)) > limit:
		return fmt.Errorf("%s %s: answer is longer than %d bytes", method, path, limit)
	case resp.StatusCode/100 != 2:
		return fault.New(Kind(resp.StatusCode), &StatusError{resp.StatusCode, errorText(b), RetryAfter(resp.Header)})
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("%s %s: answer is not what was expected: %w", method, path, err)
	}
	return nil
}

// StatusError is an answer that is not a success.
type StatusError struct {
	Status     int
	Text       string
	RetryAfter time.Duration // 0: the server did not say
}

// Error returns "http status N: text".
func (e *StatusError) Error() string { return fmt.Sprintf("http status %d: %s", e.Status, e.Text) }

// RetryAfter reads the header of that name in seconds, 0 if there is none; at most an hour is believed.
func RetryAfter(h http.Header) time.Duration {
	n, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil || n < 0 {
		return 0
	}
	return min(time.Duration(n), 3600) * time.Second
}

// errorText returns the error member of a JSON body, otherwise the start of the body itself.
func errorText(b []byte) string {
	var body Body
	if json.Unmarshal(b, &body) == nil && body.Error != "" {
		return body.Error
	}
	return string(bytes.TrimSpace(b[:min(len(b), 512)]))
}
