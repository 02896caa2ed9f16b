package registrationhttp

import (
	"context"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
)

// Types of DNS records and codes of DNS answers (RFC 1035 sections 3.2.2 and 4.1.1).
const (
	typeA          = 1
	codeNoError    = 0
	codeServerFail = 2
)

// AdapterOptions are what an Adapter does not need to be told. Zero values mean the defaults.
type AdapterOptions struct {
	Observe Observe // told of the paths "/" (any that is a look-up) and PathHealth

	Timeout time.Duration // of a look-up; what is not known by then is 500. Default 10 s
	Places  int           // look-ups at once; others wait up to 2 s for a place and are then 503. Default 1,024
}

// Adapter answers DNS questions that are asked over HTTP, as the deployed adapter does: any method, any path but PathHealth, the question
// in the parameters name and type. Addresses are shuffled for each answer and hold for no time. There is no NXDOMAIN: a name that stands
// for nothing has no answers.
func Adapter(resolve Resolve, log *slog.Logger, o AdapterOptions) http.Handler {
	if o.Timeout <= 0 {
		o.Timeout = 10 * time.Second
	}
	if o.Places <= 0 {
		o.Places = 1024
	}
	a := &adapter{resolve: resolve, timeout: o.Timeout, failures: httpjson.Failures{Log: log}}
	answer := httpjson.Admit(o.Places, admission, http.HandlerFunc(a.answer)).ServeHTTP
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == PathHealth {
			o.Observe.observed(PathHealth, w, r, func(http.ResponseWriter, *http.Request) {})
			return
		}
		o.Observe.observed("/", w, r, answer)
	})
}

type adapter struct {
	resolve  Resolve
	timeout  time.Duration
	failures httpjson.Failures
}

func (a *adapter) answer(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	name, kind := query.Get("name"), uint16(typeA)
	if t := query.Get("type"); t != "" {
		kind = 0 // what is no type has no answers either
		if n, err := strconv.ParseUint(t, 10, 16); err == nil {
			kind = uint16(n)
		}
	}
	switch {
	case kind != typeA:
		writeJSON(w, http.StatusOK, appendAnswer(nil, codeNoError, name, kind, nil))
		return
	case name == "":
		writeJSON(w, http.StatusBadRequest, appendAnswer(nil, codeServerFail, name, kind, nil))
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), a.timeout)
	defer cancel()
	addrs, err := a.resolve(ctx, name)
	if err != nil {
		level := slog.LevelWarn
		if r.Context().Err() != nil { // who asked has gone
			level = slog.LevelDebug
		}
		a.failures.Write(r.Context(), level, "resolve", http.StatusInternalServerError,
			append(httpjson.Attrs(r), "name", name[:min(len(name), 300)], "error", err))
		http.Error(w, "look up name: "+fault.Of(err).Error()+": see the log of the adapter", http.StatusInternalServerError)
		return
	}
	addrs = slices.DeleteFunc(addrs, func(a netip.Addr) bool { return !a.Is4() })
	shuffle(addrs)
	writeJSON(w, http.StatusOK, appendAnswer(nil, codeNoError, name, kind, addrs))
}

func appendAnswer(b []byte, code int, name string, kind uint16, addrs []netip.Addr) []byte {
	asked := appendText(nil, name)
	b = strconv.AppendInt(append(b, `{"Status":`...), int64(code), 10)
	b = append(b, `,"TC":false,"RD":false,"RA":false,"AD":false,"CD":false,"Question":[{"name":`...)
	b = strconv.AppendUint(append(append(b, asked...), `,"type":`...), uint64(kind), 10)
	b = append(b, `}],"Answer":[`...)
	for i, a := range addrs {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, `{"name":`...), asked...), `,"type":1,"TTL":0,"data":"`...)
		b = append(a.AppendTo(b), `"}`...)
	}
	return append(b, `],"Additional":[],"edns_client_subnet":"0.0.0.0/0"}`...)
}
