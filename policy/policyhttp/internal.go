package policyhttp

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
)

// InternalOptions are what an InternalHandler does not need to be told. Zero values mean the defaults.
type InternalOptions struct {
	// Clients are the names of certificates, common name or DNS name, whose owners are served ("*" stands for anything). Nil: all that
	// the listener lets in.
	Clients []string

	// BindHosts refuses (403) a watch for a host that the client's certificate does not speak for: whose address is not an IP SAN of it, and whose name
	// not its common name or a DNS name. And it gives clients that Clients does not name no tag but that of identity.IngressRouter, kind
	// identity.Router: tags that no policy needs are never free again.
	BindHosts bool

	// Observe, if set, is told of every answered request: the route ("other" for one that is not served), the status and the time
	// it took. It is called from many goroutines.
	Observe func(route string, status int, took time.Duration)

	Timeout  time.Duration // of a request but for a watch's wait; default 10 s
	Lists    int           // lists served at once, long answers to watches included, a quarter for one address; default 64
	Watchers int           // watches at once, likewise; default 20,000
	Bodies   int           // bodies of watches of more than 64 KiB read at once, likewise; default 16
	SetBytes int           // memory for the groups that hosts have asked for; default 64 MiB
}

// InternalHandler serves the internal API over b. Its listener demands certificates.
func InternalHandler(b Backend, log *slog.Logger, o InternalOptions) http.Handler {
	o.Timeout = orDefault(o.Timeout, 10*time.Second)
	h := &internal{
		b: b, log: log, o: o, failures: httpjson.Failures{Log: log}, lists: newPlaces(orDefault(o.Lists, 64)),
		watchers: newPlaces(orDefault(o.Watchers, 20000)), bodies: newPlaces(orDefault(o.Bodies, 16)), sets: groupSets{limit: orDefault(o.SetBytes, 64<<20)},
	}
	h.routes = map[string]internalRoute{
		"policies":              {http.MethodGet, http.HandlerFunc(h.policies)},
		"policies_last_updated": {http.MethodGet, http.HandlerFunc(h.lastUpdated)},
		"security_groups":       {http.MethodGet, http.HandlerFunc(h.securityGroups)},
		"security_groups/watch": {http.MethodPost, http.HandlerFunc(h.watchGroups)},
		"tags":                  {http.MethodPut, http.HandlerFunc(h.tag)},
		"watch":                 {http.MethodPost, http.HandlerFunc(h.watch)},
	}
	return h
}

type internal struct {
	b        Backend
	log      *slog.Logger
	o        InternalOptions
	routes   map[string]internalRoute // by what follows /networking/VERSION/internal/
	lists    *places
	watchers *places
	bodies   *places
	failures httpjson.Failures
	sets     groupSets
}

type internalRoute struct {
	verb  string
	serve http.Handler
}

// find returns the route of a path. Reading is the same in any version; what changes something has one.
func (h *internal) find(path string) (string, internalRoute, bool) {
	rest, ok := strings.CutPrefix(path, "/networking/")
	v, rest, ok2 := strings.Cut(rest, "/")
	name, ok3 := strings.CutPrefix(rest, "internal/")
	rt, ok4 := h.routes[name]
	if !ok || !ok2 || !ok3 || !ok4 || v == "" || rt.verb != http.MethodGet && v != "v1" {
		return "other", rt, false
	}
	return name, rt, true
}

// ServeHTTP implements http.Handler.
func (h *internal) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	rec := &httpjson.Recorder{ResponseWriter: w, Code: http.StatusOK}
	name, rt, ok := h.find(r.URL.Path)
	switch {
	case !ok:
		http.NotFound(rec, r)
	case r.Method != rt.verb:
		notAllowed(rec, []string{rt.verb})
	default:
		if rt.verb != http.MethodPost { // watches, of which there are many, that nobody reads
			rec.Header().Set("Strict-Transport-Security", hsts)
			rec.Header().Set(requestID, newRequestID(r.Header.Get(requestID)))
		}
		if err := h.known(r); err != nil {
			h.fail(rec, r, http.StatusForbidden, err.Error(), nil)
			break
		}
		rt.serve.ServeHTTP(rec, r)
	}
	took := time.Since(start)
	if h.o.Observe != nil {
		h.o.Observe(name, rec.Code, took)
	}
	if h.log.Enabled(r.Context(), slog.LevelDebug) {
		h.logServed(r, rec.Code, took)
	}
}

func (h *internal) logServed(r *http.Request, status int, took time.Duration) {
	h.log.Debug("request served", append(httpjson.Attrs(r), "status", status, "took", took)...)
}

// certificate returns the client's, nil if it showed none.
func certificate(r *http.Request) *x509.Certificate {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil
	}
	return r.TLS.PeerCertificates[0]
}

// known reports, as fault.Denied, a client whose certificate is not one of those that are served.
func (h *internal) known(r *http.Request) error {
	if h.o.Clients == nil || listed(h.o.Clients, certificate(r)) {
		return nil
	}
	name := "nobody"
	if c := certificate(r); c != nil {
		name = strconv.Quote(c.Subject.CommonName)
	}
	return fault.Deniedf("the client certificate of %.100s is not one of internal_clients", name)
}

// listed reports whether one of the names of a certificate matches one of the patterns.
func listed(patterns []string, c *x509.Certificate) bool {
	if c == nil {
		return false
	}
	for _, p := range patterns {
		if Matches(p, c.Subject.CommonName) {
			return true
		}
		for _, n := range c.DNSNames {
			if Matches(p, n) {
				return true
			}
		}
	}
	return false
}

// Matches reports whether a name is what a pattern says, in which each "*" stands for any text. The empty name matches nothing.
func Matches(pattern, name string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == name && name != ""
	}
	first, last := parts[0], parts[len(parts)-1]
	if name == "" || len(name) < len(first)+len(last) || !strings.HasPrefix(name, first) || !strings.HasSuffix(name, last) {
		return false
	}
	name = name[len(first) : len(name)-len(last)]
	for _, p := range parts[1 : len(parts)-1] {
		_, after, ok := strings.Cut(name, p)
		if !ok {
			return false
		}
		name = after
	}
	return true
}

// speaksFor reports, as fault.Denied, a host that the client's certificate does not speak for.
func (h *internal) speaksFor(r *http.Request, host string) error {
	if !h.o.BindHosts {
		return nil
	}
	c := certificate(r)
	if c == nil {
		return fault.Deniedf("there is no client certificate that could speak for %s", host)
	}
	want, err := netip.ParseAddr(host)
	for _, ip := range c.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); ok && err == nil && a.Unmap() == want.Unmap() {
			return nil
		}
	}
	if err != nil && (host == c.Subject.CommonName || slices.Contains(c.DNSNames, host)) {
		return nil
	}
	return fault.Deniedf("the client certificate of %q speaks for the addresses %v, not for %s: issue one with that address as IP SAN",
		c.Subject.CommonName, c.IPAddresses, host)
}

// fail answers an error. Its cause, if there is one, is for the log only.
func (h *internal) fail(w http.ResponseWriter, r *http.Request, status int, text string, cause error) {
	level := slog.LevelInfo
	switch {
	case cause != nil && r.Context().Err() != nil: // the caller has gone, or we are stopping
		level = slog.LevelDebug
	case status == http.StatusPreconditionRequired: // a part of the protocol
		level = slog.LevelDebug
	case status >= http.StatusInternalServerError:
		level = slog.LevelError
	}
	args := append(httpjson.Attrs(r), "answer", text)
	if cause != nil {
		args = append(args, "error", cause)
	}
	h.failures.Write(r.Context(), level, r.Method, status, args)
	httpjson.WriteError(w, status, text)
}

func (h *internal) policies(w http.ResponseWriter, r *http.Request) {
	f, err := filterOf(r.URL.RawQuery)
	if err != nil {
		h.fail(w, r, http.StatusBadRequest, "query cannot be read", err)
		return
	}
	f.Sources, f.Destinations = nil, nil
	peer := peerOf(r)
	if !h.lists.enter(w, r, peer) {
		return
	}
	defer h.lists.exit(peer)
	ctx, cancel := context.WithTimeout(r.Context(), h.o.Timeout)
	defer cancel()
	rules, n, err := h.b.Rules(ctx, f)
	if err != nil {
		h.fail(w, r, http.StatusInternalServerError, "database read failed", err)
		return
	}
	writeRules(w, shape{version: v1, tags: h.b.TagLength}, rules, n)
}

func (h *internal) lastUpdated(w http.ResponseWriter, r *http.Request) {
	h.b.Polled(time.Now())
	ctx, cancel := context.WithTimeout(r.Context(), h.o.Timeout)
	defer cancel()
	ns, err := h.b.Stamp(ctx)
	if err != nil {
		h.fail(w, r, http.StatusInternalServerError, "database read failed", err)
		return
	}
	writeJSON(w, http.StatusOK, strconv.AppendInt(nil, ns, 10))
}

// tag gives a group that an internal client names a tag.
func (h *internal) tag(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64<<10))
	if err != nil {
		h.fail(w, r, http.StatusBadRequest, "failed reading request body", err)
		return
	}
	var in struct {
		ID   identity.Group `json:"id"`
		Type string         `json:"type"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		h.fail(w, r, http.StatusBadRequest, "failed parsing request body", err)
		return
	}
	if h.o.BindHosts && (in.Type != identity.Router || in.ID != identity.IngressRouter) && !listed(h.o.Clients, certificate(r)) {
		h.fail(w, r, http.StatusForbidden, "only the tag of "+string(identity.IngressRouter)+", type "+identity.Router+", is given to clients that are not one of internal_clients", nil)
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), h.o.Timeout)
	defer cancel()
	t, err := h.b.Tag(ctx, in.ID, in.Type)
	switch {
	case err == nil:
		writeJSON(w, http.StatusOK, appendTagged(nil, identity.Tagged{Group: in.ID, Tag: t, Kind: in.Type}, h.b.TagLength))
	case errors.Is(err, fault.Invalid):
		h.fail(w, r, http.StatusBadRequest, err.Error(), nil)
	case errors.Is(err, fault.Exhausted):
		h.fail(w, r, http.StatusConflict, "tag cannot be given: "+err.Error(), nil)
	case errors.Is(err, fault.Unavailable):
		w.Header().Set("Retry-After", "1")
		h.fail(w, r, http.StatusServiceUnavailable, "database is away", err)
	default: // a group that has a tag of another type included, as in the deployed server
		h.fail(w, r, http.StatusInternalServerError, "database create failed", err)
	}
}
