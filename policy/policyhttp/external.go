package policyhttp

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/policy"
)

const (
	maxBody   = 10 << 20        // of a request to the external API, in bytes
	admission = 2 * time.Second // that a request waits for a place
)

// ErrNoCredentials is what Authenticate returns for a request that has none.
var ErrNoCredentials = fault.Deniedf("missing authorization header")

// ExternalOptions are what an ExternalHandler does not find in its Backend.
type ExternalOptions struct {
	// Authenticate says who sends a request. ErrNoCredentials and other errors that are fault.Denied are answered 401 with their
	// text, others 503: whoever could tell is away.
	Authenticate func(r *http.Request) (Caller, error)

	// Access returns which of the groups a caller who is no admin may write. A group that does not exist is none of them.
	Access func(ctx context.Context, c Caller, groups []identity.Group) (map[identity.Group]bool, error)

	// Cleanup removes stale policies and returns them, within CleanupTime; force overrides the brakes. Nil: there is nobody who could tell what is stale.
	Cleanup func(ctx context.Context, force bool) ([]policy.Policy, error)

	SelfService bool     // callers need no scope to create, delete and list
	MaxPolicies int      // of one source, unless an admin adds more; 0: any number
	CORS        []string // origins, "*" for any
	HSTS        bool     // the listener has TLS

	// Observe, if set, is told of every answered request: the route ("other" for one that is not served), the status and the time
	// it took. It is called from many goroutines.
	Observe func(route string, status int, took time.Duration)

	Timeout time.Duration // of a request, but for waiting until a change is in force; default 30 s
	Places  int           // requests served at once, a quarter for one caller; default 128
	Waiting int           // requests that wait for force at once, likewise; default 1024
	Bodies  int           // bodies of more than 64 KiB read and served at once, likewise; default 16
}

// ExternalHandler serves the external API over b.
func ExternalHandler(b Backend, log *slog.Logger, o ExternalOptions) http.Handler {
	o.Timeout = orDefault(o.Timeout, 30*time.Second)
	h := &external{
		b: b, log: log, o: o, started: time.Now(), failures: httpjson.Failures{Log: log},
		places: newPlaces(orDefault(o.Places, 128)), waiting: newPlaces(orDefault(o.Waiting, 1024)), bodies: newPlaces(orDefault(o.Bodies, 16)),
		database: newProber(b.Ping),
	}
	h.routes = map[string][]route{
		"/":                {{verb: http.MethodGet, serve: h.uptime, open: true}},
		"/networking":      {{verb: http.MethodGet, serve: h.uptime, open: true}},
		"/health":          {{verb: http.MethodGet, serve: h.health, open: true}},
		"whoami":           {{verb: http.MethodGet, serve: h.whoami, scopes: adminOnly}},
		"policies":         {{verb: http.MethodPost, serve: h.create, scopes: writers}, {verb: http.MethodGet, serve: h.list, scopes: writers}},
		"policies/delete":  {{verb: http.MethodPost, serve: h.delete, scopes: writers}},
		"policies/cleanup": {{verb: http.MethodPost, serve: h.cleanup, scopes: adminOnly}},
		"tags":             {{verb: http.MethodGet, serve: h.tags, scopes: adminOnly}},
		"security_groups": {
			{verb: http.MethodPost, serve: h.createGroup, scopes: adminOnly}, {verb: http.MethodGet, serve: h.listGroups, scopes: adminOnly},
		},
		oneGroup: {
			{verb: http.MethodPatch, serve: h.changeGroup, scopes: adminOnly}, {verb: http.MethodGet, serve: h.showGroup, scopes: adminOnly},
			{verb: http.MethodDelete, serve: h.deleteGroup, scopes: adminOnly},
		},
	}
	return h
}

// oneGroup is the name of the routes of one security group.
const oneGroup = "security_groups/GUID"

var (
	adminOnly = []string{Admin}
	writers   = []string{Admin, Writer}
)

type external struct {
	b        Backend
	log      *slog.Logger
	o        ExternalOptions
	started  time.Time
	routes   map[string][]route // by path, or by what follows /networking/VERSION/external/
	failures httpjson.Failures
	places   *places
	waiting  *places
	bodies   *places
	database *prober
}

type route struct {
	verb   string
	serve  func(w http.ResponseWriter, r *http.Request, c *call)
	open   bool     // to anybody
	scopes []string // of which a caller needs one
}

// call is what is known of a request when its route is called.
type call struct {
	version version
	caller  Caller
}

// peer is by whom places are counted.
func (c *call) peer() string { return cmp.Or(c.caller.Subject, c.caller.Name) }

// find returns the routes of a path and its version.
func (h *external) find(path string) (name, v string, rs []route) {
	if rest, ok := strings.CutPrefix(path, "/networking/"); ok {
		v, rest, ok = strings.Cut(rest, "/")
		name, found := strings.CutPrefix(rest, "external/")
		if !ok || !found || v == "" || strings.HasPrefix(name, "/") {
			return "other", "", nil
		}
		if guid, ok := strings.CutPrefix(name, "security_groups/"); ok && guid != "" && !strings.Contains(guid, "/") {
			name = oneGroup
		}
		return name, v, h.routes[name]
	}
	if !strings.HasPrefix(path, "/") {
		return "other", "", nil
	}
	return path, "", h.routes[path]
}

// ServeHTTP routes by the exact path and method, as the deployed server does: route, version, credentials, scope, body.
func (h *external) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	rec := &httpjson.Recorder{ResponseWriter: w, Code: http.StatusOK}
	name, v, rs := h.find(r.URL.Path)
	i := slices.IndexFunc(rs, func(rt route) bool { return rt.verb == r.Method })
	switch {
	case rs == nil:
		name = "other"
		http.NotFound(rec, r)
	case r.Method == http.MethodOptions:
		h.headers(rec, r)
		h.options(rec, v, rs)
	case i < 0:
		notAllowed(rec, append(verbs(rs), http.MethodOptions))
	default:
		h.headers(rec, r)
		h.serve(rec, r, rs[i], v)
	}
	took := time.Since(start)
	if h.o.Observe != nil {
		h.o.Observe(strings.TrimPrefix(name, "/"), rec.Code, took)
	}
	if h.log.Enabled(r.Context(), slog.LevelDebug) {
		h.log.Debug("request served", append(httpjson.Attrs(r), "request_id", rec.Header().Get(requestID), "status", rec.Code, "took", took)...)
	}
}

func (h *external) serve(w http.ResponseWriter, r *http.Request, rt route, v string) {
	w.Header().Set(requestID, newRequestID(r.Header.Get(requestID)))
	if v != "" && v != string(v0) && v != string(v1) {
		httpjson.WriteError(w, http.StatusNotAcceptable, fmt.Sprintf("api version '%s' not supported", v))
		return
	}
	c := call{version: version(v)}
	if !rt.open && !h.admit(w, r, rt, &c) {
		return
	}
	rt.serve(w, r, &c)
}

// admit finds out who the caller is and whether the scopes suffice, or answers.
func (h *external) admit(w http.ResponseWriter, r *http.Request, rt route, c *call) bool {
	var err error
	c.caller, err = h.o.Authenticate(r)
	switch {
	case errors.Is(err, fault.Denied):
		w.Header().Set("WWW-Authenticate", "Bearer")
		h.fail(w, r, http.StatusUnauthorized, err.Error(), nil)
		return false
	case err != nil:
		w.Header().Set("Retry-After", "5")
		h.fail(w, r, http.StatusServiceUnavailable, "credentials cannot be verified at present: try again later", err)
		return false
	case h.o.SelfService && len(rt.scopes) == len(writers):
		return true
	case !slices.ContainsFunc(rt.scopes, func(s string) bool { return slices.Contains(c.caller.Scopes, s) }):
		h.fail(w, r, http.StatusForbidden, fmt.Sprintf("provided scopes [%s] do not include allowed scopes [%s]",
			strings.Join(c.caller.Scopes, " "), strings.Join(rt.scopes, " ")), nil)
		return false
	}
	return true
}

func notAllowed(w http.ResponseWriter, allowed []string) {
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	http.Error(w, http.StatusText(http.StatusMethodNotAllowed), http.StatusMethodNotAllowed)
}

func verbs(rs []route) []string {
	vs := make([]string, 0, len(rs)+1)
	for _, rt := range rs {
		vs = append(vs, rt.verb)
	}
	return vs
}

// headers are those of every routed answer.
func (h *external) headers(w http.ResponseWriter, r *http.Request) {
	hd := w.Header()
	hd.Set("X-XSS-Protection", "1; mode=block")
	hd.Set("X-Content-Type-Options", "nosniff")
	hd.Set("X-Frame-Options", "deny")
	hd.Set("Content-Security-Policy", "frame-ancestors 'none'")
	if h.o.HSTS {
		hd.Set("Strict-Transport-Security", hsts)
	}
	origin := r.Header.Get("Origin")
	if origin == "" {
		return
	}
	if i := slices.IndexFunc(h.o.CORS, func(o string) bool { return o == origin || o == "*" }); i >= 0 {
		hd.Set("Access-Control-Allow-Origin", h.o.CORS[i])
	}
}

const (
	hsts      = "max-age=31536000"
	requestID = "X-Vcap-Request-Id"
)

func (h *external) options(w http.ResponseWriter, v string, rs []route) {
	vs := verbs(rs)
	if strings.Trim(strings.ToLower(v), "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
		vs = nil
	}
	w.Header().Set("Access-Control-Allow-Methods", strings.Join(append(vs, http.MethodOptions), ","))
	w.Header().Set("Access-Control-Allow-Headers", "authorization")
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusOK)
}

const digits = "0123456789abcdef"

// newRequestID returns the identity of a request: what the router gave it, if anything, and a random part.
func newRequestID(given string) string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	text := make([]byte, 0, 36)
	for i, c := range b {
		if i == 4 || i == 6 || i == 8 || i == 10 {
			text = append(text, '-')
		}
		text = append(text, digits[c>>4], digits[c&15])
	}
	id := string(text)
	if given == "" || len(given) > 256 {
		return id
	}
	return given + "::" + id
}

// fail answers an error. Its cause, if there is one, is for the log only.
func (h *external) fail(w http.ResponseWriter, r *http.Request, status int, text string, cause error) {
	level := slog.LevelInfo
	switch {
	case cause != nil && r.Context().Err() != nil: // the caller has gone, or we are stopping
		level = slog.LevelDebug
	case status >= http.StatusInternalServerError:
		level = slog.LevelError
	}
	args := append(httpjson.Attrs(r), "request_id", w.Header().Get(requestID), "answer", text)
	if cause != nil {
		args = append(args, "error", cause)
	}
	h.failures.Write(r.Context(), level, r.Method, status, args)
	httpjson.WriteError(w, status, text)
}

func (h *external) uptime(w http.ResponseWriter, _ *http.Request, _ *call) { writeUptime(w, h.started) }

func writeUptime(w http.ResponseWriter, started time.Time) {
	text := fmt.Sprintf("Network policy server, up for %v\n", time.Since(started))
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	w.Write([]byte(text))
}

func (h *external) health(w http.ResponseWriter, r *http.Request, _ *call) {
	ctx, cancel := context.WithTimeout(r.Context(), 2*probeTime)
	defer cancel()
	if err := h.database.ask(ctx); err != nil {
		h.fail(w, r, http.StatusInternalServerError, "check database failed", err)
	}
}

func (h *external) whoami(w http.ResponseWriter, _ *http.Request, c *call) {
	httpjson.Write(w, http.StatusOK, map[string]string{"subject": c.caller.Name})
}

func (h *external) tags(w http.ResponseWriter, r *http.Request, _ *call) {
	ctx, cancel := context.WithTimeout(r.Context(), h.o.Timeout)
	defer cancel()
	ts, err := h.b.Tags(ctx)
	if err != nil {
		h.fail(w, r, http.StatusInternalServerError, "database read failed", err)
		return
	}
	writeTags(w, ts, h.b.TagLength)
}

func orDefault[T int | time.Duration](v, d T) T {
	if v <= 0 {
		return d
	}
	return v
}
