package authorityhttp

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
)

const (
	maxBody   = 16 << 10        // of a request, in bytes: a CSR with an RSA key of 8192 bits has 3 KiB
	admission = 2 * time.Second // that a request waits for a place
	timeout   = 10 * time.Second
)

// Outcome is how a request for an intermediate ended.
type Outcome string

// The outcomes.
const (
	Issued      Outcome = "issued"
	Foreign     Outcome = "foreign"     // the client's certificate does not speak for the host, or not any more
	NoLease     Outcome = "no_lease"    // the host holds none
	Malformed   Outcome = "malformed"   // no request, or a weak key
	TooOften    Outcome = "too_often"   // the host asks without pause
	Unavailable Outcome = "unavailable" // the root's files, the root itself or the database cannot be used now, or too much is asked at once
)

// HandlerOptions are what a Handler does not need to be told.
type HandlerOptions struct {
	// Observe, if set, is told of every answered request: the path ("other" for one that is not served), the status and the time it took.
	Observe func(path string, status int, took time.Duration)

	// Count, if set, is told how each request for an intermediate ended. Both are called from many goroutines.
	Count func(Outcome)

	Places int // requests for intermediates served at once; default 64
}

type handler struct {
	src      Source
	log      *slog.Logger
	o        HandlerOptions
	places   chan struct{}
	asked    paces
	failures httpjson.Failures
}

// Handler serves PathIntermediate and PathRoots from src. A host that asks for intermediates without pause is answered 429 with Retry-After.
func Handler(src Source, log *slog.Logger, o HandlerOptions) http.Handler {
	if o.Places <= 0 {
		o.Places = 64
	}
	if o.Observe == nil {
		o.Observe = func(string, int, time.Duration) {}
	}
	if o.Count == nil {
		o.Count = func(Outcome) {}
	}
	return &handler{src: src, log: log, o: o, places: make(chan struct{}, o.Places), failures: httpjson.Failures{Log: log}}
}

// ServeHTTP routes by the exact path and method.
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	path := r.URL.Path
	rec := &httpjson.Recorder{ResponseWriter: w, Code: http.StatusOK}
	switch path {
	case PathIntermediate:
		h.only(http.MethodPost, h.intermediate, rec, r)
	case PathRoots:
		h.only(http.MethodGet, h.roots, rec, r)
	default:
		path = "other"
		http.NotFound(rec, r)
	}
	took := time.Since(start)
	h.o.Observe(path, rec.Code, took)
	if h.log.Enabled(r.Context(), slog.LevelDebug) {
		h.log.Debug("request served", append(httpjson.Attrs(r), "status", rec.Code, "took", took)...)
	}
}

func (h *handler) only(method string, serve http.HandlerFunc, w http.ResponseWriter, r *http.Request) {
	if r.Method != method {
		w.Header().Set("Allow", method)
		http.Error(w, http.StatusText(http.StatusMethodNotAllowed), http.StatusMethodNotAllowed)
		return
	}
	serve(w, r)
}

// roots answers whoever has a certificate: roots are no secret, and what proves a container's identity is not theirs alone to know.
func (h *handler) roots(w http.ResponseWriter, r *http.Request) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		h.fail(w, r, "container-ca-roots", fault.Deniedf("there is no client certificate"))
		return
	}
	root, err := h.src.Root()
	if err != nil {
		h.fail(w, r, "container-ca-roots", err)
		return
	}
	b := root.Bundle().PEM()
	w.Header().Set("Content-Type", "application/x-pem-file")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.Write(b)
}

func (h *handler) intermediate(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody)) // before a place is asked for: who sends slowly takes none
	var in request
	if err == nil {
		err = json.Unmarshal(body, &in)
	}
	if err != nil {
		h.o.Count(Malformed)
		h.fail(w, r, "container-ca-intermediate", fault.New(fault.Invalid, err))
		return
	}
	if !httpjson.Enter(h.places, admission, w, r) {
		h.o.Count(Unavailable)
		return
	}
	defer func() { <-h.places }()
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	a, outcome, err := h.issue(ctx, r, in)
	h.o.Count(outcome)
	if outcome == Foreign {
		w.Header().Set("Connection", "close") // the next one may be with another certificate
	}
	switch {
	case outcome == TooOften:
		w.Header().Set("Retry-After", strconv.Itoa(int(pace/time.Second)))
		h.answer(w, r, http.StatusTooManyRequests, "container-ca-intermediate", err)
	case err != nil:
		h.fail(w, r, "container-ca-intermediate", err)
	default:
		h.log.Info("intermediate issued", "underlay", in.Underlay, "expires", a.Expires, "remote", r.RemoteAddr)
		httpjson.Write(w, http.StatusOK, a)
	}
}

// issue decides about one request: who asks comes first, so that nobody uses up what another host may ask.
func (h *handler) issue(ctx context.Context, r *http.Request, in request) (answer, Outcome, error) {
	host, err := netip.ParseAddr(in.Underlay)
	if err != nil || host.Zone() != "" || host.Is4In6() {
		return answer{}, Malformed, fault.Invalidf("underlay address %.80q: expected an address such as 10.0.16.5", in.Underlay)
	}
	if err := httpjson.SpeaksFor(r, host); err != nil {
		return answer{}, Foreign, err
	}
	if c := r.TLS.PeerCertificates[0]; !valid(c, time.Now()) { // a connection may outlive what was verified when it began
		return answer{}, Foreign, fault.Deniedf("the client certificate of %q is valid from %v to %v: connect anew with another", c.Subject.CommonName,
			c.NotBefore.UTC().Format(time.RFC3339), c.NotAfter.UTC().Format(time.RFC3339))
	}
	if !h.asked.admit(host, time.Now()) {
		return answer{}, TooOften, fault.Unavailablef("%v asks too often: at most every %v", host, pace)
	}
	q, err := authority.ParseRequest([]byte(in.CSR))
	if err != nil {
		return answer{}, Malformed, err
	}
	root, err := h.src.Root()
	if err != nil {
		return answer{}, Unavailable, err
	}
	subnets, err := h.src.Subnets(ctx, host)
	if err != nil {
		return answer{}, Unavailable, err
	}
	if len(subnets) == 0 {
		return answer{}, NoLease, fault.Deniedf("%v holds no lease: it has no containers to sign for", host)
	}
	c := authority.Constraints{Subnets: slices.Clone(subnets), Domains: h.src.Domains, TrustDomain: h.src.TrustDomain}
	cert, err := root.Intermediate(host, q, c, h.src.Validity, time.Now())
	if err != nil {
		return answer{}, Unavailable, err
	}
	chain := authority.EncodeCertificates([]*x509.Certificate{cert, root.Certificate()})
	return answer{string(chain), string(root.Bundle().PEM()), cert.NotAfter.UTC()}, Issued, nil
}

func valid(c *x509.Certificate, now time.Time) bool {
	return !now.Before(c.NotBefore) && !now.After(c.NotAfter)
}

// fail answers with the status of err's kind.
func (h *handler) fail(w http.ResponseWriter, r *http.Request, what string, err error) {
	h.answer(w, r, httpjson.Status(fault.Of(err)), what, err)
}

// answer sends "what: why". The why of an internal failure goes to the log only.
func (h *handler) answer(w http.ResponseWriter, r *http.Request, status int, what string, err error) {
	why, level := err.Error(), slog.LevelInfo
	if status >= http.StatusInternalServerError {
		level = slog.LevelError
		why = fault.Of(err).Error() + ": see the log of the controller"
		if r.Context().Err() != nil { // the caller has gone, or we are stopping
			level = slog.LevelDebug
		}
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "5")
	}
	h.failures.Write(r.Context(), level, what, status, append(httpjson.Attrs(r), "error", err))
	httpjson.WriteError(w, status, what+": "+why)
}
