package leasehttp

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/lease"
)

const (
	maxBody   = 4 << 10         // of a request, in bytes
	admission = 2 * time.Second // that a request waits for a place
	short     = 256             // leases in an update that needs no place among the lists
)

// HandlerOptions are what a Handler does not need to be told. Zero values mean the defaults.
type HandlerOptions struct {
	// BindUnderlay refuses (403) a request about an underlay address that is not an IP SAN of the client's certificate.
	BindUnderlay bool

	// Observe, if set, is told of every answered request: the path ("other" for one that is not served), the status and the
	// time it took. It is called from many goroutines.
	Observe func(path string, status int, took time.Duration)

	Timeout  time.Duration // of a request but for a watch's wait; default 10 s
	Changes  int           // acquire, release and renew served at once; default 512
	Lists    int           // lists served at once, whole lists among the answers to watches included; default 128
	Watchers int           // watches at once; default 20,000
}

// Handler serves reg: the routes of the deployed controller as they are, and PathWatch. Requests beyond the limits wait for
// up to 2 s and are then answered 503 with Retry-After.
func Handler(reg lease.Registry, log *slog.Logger, o HandlerOptions) http.Handler {
	o.Timeout = orDefault(o.Timeout, 10*time.Second)
	h := &handler{reg: reg, log: log, o: o, failures: httpjson.Failures{Log: log}, lists: make(chan struct{}, orDefault(o.Lists, 128))}
	changes := make(chan struct{}, orDefault(o.Changes, 512))
	watches := make(chan struct{}, orDefault(o.Watchers, 20000))
	change := func(serve http.HandlerFunc) http.Handler {
		return h.received(httpjson.AdmitTo(changes, admission, serve))
	}
	h.routes = map[string]route{
		PathLeases:  {http.MethodGet, httpjson.AdmitTo(h.lists, admission, http.HandlerFunc(h.list))},
		PathAcquire: {http.MethodPut, change(h.acquire)},
		PathRelease: {http.MethodPut, change(h.release)},
		PathRenew:   {http.MethodPut, change(h.renew)},
		PathWatch:   {http.MethodGet, httpjson.AdmitTo(watches, admission, http.HandlerFunc(h.watch))},
	}
	return h
}

func orDefault[T int | time.Duration](v, d T) T {
	if v <= 0 {
		return d
	}
	return v
}

type handler struct {
	reg    lease.Registry
	log    *slog.Logger
	o      HandlerOptions
	routes map[string]route
	lists  chan struct{} // places

	failures httpjson.Failures

	encoded listCache
	updates updateCache
	seal    atomic.Pointer[lease.Update] // without changes, at the last revision at which a wait ended in vain
}

type route struct {
	method string
	serve  http.Handler
}

// ServeHTTP routes by the exact path and method: http.ServeMux would clean paths and serve HEAD.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	path := r.URL.Path
	rec := &httpjson.Recorder{ResponseWriter: w, Code: http.StatusOK}
	rt, ok := h.routes[path]
	switch {
	case !ok:
		path = "other"
		http.NotFound(rec, r)
	case r.Method != rt.method:
		rec.Header().Set("Allow", rt.method)
		http.Error(rec, http.StatusText(http.StatusMethodNotAllowed), http.StatusMethodNotAllowed)
	default:
		rt.serve.ServeHTTP(rec, r)
	}
	took := time.Since(start)
	if h.o.Observe != nil {
		h.o.Observe(path, rec.Code, took)
	}
	if h.log.Enabled(r.Context(), slog.LevelDebug) {
		h.logServed(r, rec.Code, took)
	}
}

func (h *handler) logServed(r *http.Request, status int, took time.Duration) {
	h.log.Debug("request served", append(httpjson.Attrs(r), "status", status, "took", took)...)
}

func (h *handler) list(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), h.o.Timeout)
	defer cancel()
	ls, err := h.reg.Leases(ctx)
	if err != nil {
		h.fail(w, r, http.StatusInternalServerError, "all-routable-leases: getting all leases", err)
		return
	}
	writeJSON(w, h.encoded.encode(ls))
}

func (h *handler) acquire(w http.ResponseWriter, r *http.Request) {
	var in acquireRequest
	if !h.read(w, r, &in) {
		return
	}
	underlay, err := netip.ParseAddr(in.Underlay)
	if err != nil || !underlay.Is4() {
		// The deployed controller answers 500 here, not 400.
		httpjson.WriteError(w, http.StatusInternalServerError, "invalid ipv4 address: "+in.Underlay)
		return
	}
	kind := lease.Block
	if in.Single {
		kind = lease.Single
	}
	var l lease.Lease
	err = h.bound(r, underlay)
	if err == nil {
		ctx, cancel := h.finishing(r)
		defer cancel()
		l, err = h.reg.Acquire(ctx, underlay, kind)
	}
	switch fault.Of(err) {
	case fault.Exhausted:
		h.failures.Write(r.Context(), slog.LevelWarn, "acquire-subnet-lease", http.StatusConflict,
			append(httpjson.Attrs(r), "underlay", underlay, "kind", kind, "error", err))
		httpjson.WriteError(w, http.StatusConflict, "no lease available")
	case fault.Denied:
		h.fail(w, r, http.StatusForbidden, "acquire-subnet-lease", err)
	default:
		if err != nil {
			h.fail(w, r, http.StatusInternalServerError, "acquire-subnet-lease", err)
			return
		}
		writeJSON(w, appendLease(make([]byte, 0, leaseSize), l))
	}
}

func (h *handler) renew(w http.ResponseWriter, r *http.Request) {
	var in wireLease
	if !h.read(w, r, &in) {
		return
	}
	l, err := in.parse()
	if err != nil { // it could never have been given
		err = fault.New(fault.Conflict, err)
	} else {
		err = h.bound(r, l.Underlay)
	}
	if err == nil {
		ctx, cancel := h.finishing(r)
		defer cancel()
		err = h.reg.Renew(ctx, l)
	}
	switch {
	case err == nil:
		writeJSON(w, []byte("{}"))
	case fault.Of(err) == fault.Conflict:
		// 409 makes an old daemon exit for good: nothing that could pass by itself may be answered so.
		h.fail(w, r, http.StatusConflict, "renew-subnet-lease", err)
	case fault.Of(err) == fault.Denied:
		h.fail(w, r, http.StatusForbidden, "renew-subnet-lease", err)
	default:
		h.fail(w, r, http.StatusInternalServerError, "renew-subnet-lease", err)
	}
}

func (h *handler) release(w http.ResponseWriter, r *http.Request) {
	var in releaseRequest
	if !h.read(w, r, &in) {
		return
	}
	underlay, err := parseUnderlay(in.Underlay)
	if err != nil { // nobody with such an address has a lease, and a release of none succeeds
		writeJSON(w, []byte("{}"))
		return
	}
	err = h.bound(r, underlay)
	if err == nil {
		ctx, cancel := h.finishing(r)
		defer cancel()
		err = h.reg.Release(ctx, underlay)
	}
	switch {
	case err == nil:
		writeJSON(w, []byte("{}"))
	case fault.Of(err) == fault.Denied:
		h.fail(w, r, http.StatusForbidden, "release lease", err)
	default:
		h.fail(w, r, http.StatusInternalServerError, "release lease", err)
	}
}

// finishing returns the context of a change: one that has been admitted is finished even if the caller leaves or the
// controller is being stopped.
func (h *handler) finishing(r *http.Request) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(r.Context()), h.o.Timeout)
}

// bound reports, as fault.Denied, a request about a host that the client's certificate does not speak for.
func (h *handler) bound(r *http.Request, underlay netip.Addr) error {
	if !h.o.BindUnderlay {
		return nil
	}
	return httpjson.SpeaksFor(r, underlay)
}

// body is what a request brought, after it was received.
type body struct {
	io.Reader
	bytes []byte
}

// Close implements io.Closer.
func (body) Close() error { return nil }

// received reads the body before next is asked for a place: a client that sends it slowly takes none.
func (h *handler) received(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var b []byte
		var err error
		if n := r.ContentLength; n >= 0 && n <= maxBody {
			b = make([]byte, n)
			_, err = io.ReadFull(r.Body, b)
		} else {
			b, err = io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		}
		if err != nil {
			h.fail(w, r, http.StatusBadRequest, "read-body", fault.New(fault.Invalid, err))
			return
		}
		r.Body = body{http.NoBody, b}
		next.ServeHTTP(w, r)
	})
}

// read decodes the body, which has been received, into v, or answers 400 and returns false.
func (h *handler) read(w http.ResponseWriter, r *http.Request, v any) bool {
	err := json.Unmarshal(r.Body.(body).bytes, v)
	if err != nil {
		h.fail(w, r, http.StatusBadRequest, "unmarshal-request", fault.New(fault.Invalid, err))
	}
	return err == nil
}

// fail answers status with "what: why". The why of an internal failure goes to the log only.
func (h *handler) fail(w http.ResponseWriter, r *http.Request, status int, what string, err error) {
	why, level := err.Error(), slog.LevelInfo
	if status >= http.StatusInternalServerError {
		level = slog.LevelError
		if k := fault.Of(err); k == fault.Internal || k == fault.Unavailable {
			why = k.Error() + ": see the log of the controller"
		}
		if r.Context().Err() != nil { // the caller has gone, or we are stopping
			level = slog.LevelDebug
		}
	}
	h.failures.Write(r.Context(), level, what, status, append(httpjson.Attrs(r), "error", err))
	httpjson.WriteError(w, status, what+": "+why)
}

func writeJSON(w http.ResponseWriter, b []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.Write(b)
}

// waitOf reads the wait that a watcher asks for.
func waitOf(s string) (time.Duration, error) {
	if s == "" {
		return 30 * time.Second, nil
	}
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, fault.New(fault.Invalid, fmt.Errorf("wait %.20q: expected whole seconds, at most %d", s, MaxWait/time.Second))
	}
	return min(time.Duration(n)*time.Second, MaxWait), nil
}
