// Package registrationhttp is names over HTTP, in three APIs: that of the deployed service-discovery controller (Controller serves it,
// Lookup asks it), that of the deployed DNS adapter (Adapter), and our own from addresses to names (NamesHandler, Names).
//
// The first two answer as the deployed programs do, so that any of the four parts can be exchanged alone; docs/api/names.md shows all of
// them with requests and answers. The package knows neither NATS nor DNS messages.
//
// Use: service.HTTP("names", ln, tlsConfig, registrationhttp.Controller(table, warm, observe), ...);
// Adapter(OfTable(table, warm), log, ...) in front of the own table, Adapter(lookup.Resolve, log, ...) in front of controllers elsewhere.
package registrationhttp

import (
	"context"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/registration"
)

// The routes.
const (
	PathRegistration = "/v1/registration/" // and the name
	PathRoutes       = "/routes"
	PathHealth       = "/health" // of the adapter
	PathNames        = "/v1/names"
)

// Resolve returns the addresses that a name stands for, as somebody wrote it, in an order of no meaning. A name that stands for none, or
// cannot be one, has no addresses and is no error; fault.Unavailable is when nobody can say now. What is returned is the caller's.
type Resolve func(ctx context.Context, name string) ([]netip.Addr, error)

// OfTable is the Resolve of a table, which says nothing until it is warm. What is asked of another Resolve after that is the caller's.
func OfTable(t *registration.Table, warm func() bool) Resolve {
	return func(_ context.Context, name string) ([]netip.Addr, error) {
		if !warm() {
			return nil, fault.Unavailablef("address table is not warm")
		}
		return addressesOf(t, name), nil
	}
}

// addressesOf looks a name up as it is written by those who ask: in any case, with a final dot or without.
func addressesOf(t *registration.Table, text string) []netip.Addr {
	name, err := registration.ParseName(text)
	if err != nil {
		return nil
	}
	addrs, _ := t.AppendAddrs(nil, []byte(name))
	return addrs
}

func shuffle(addrs []netip.Addr) {
	rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
}

// Observe is told of every answered request: the route ("other" for one that is not served), the status and the time it took. It is
// called from many goroutines.
type Observe func(path string, status int, took time.Duration)

// observed lets serve answer and observe, if there is one, know.
func (o Observe) observed(path string, w http.ResponseWriter, r *http.Request, serve http.HandlerFunc) {
	if o == nil {
		serve(w, r)
		return
	}
	start := time.Now()
	rec := &httpjson.Recorder{ResponseWriter: w, Code: http.StatusOK}
	serve(rec, r)
	o(path, rec.Code, time.Since(start))
}
