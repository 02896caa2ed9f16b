package registrationhttp

import (
	"bufio"
	"encoding/json"
	"net/http"
	"net/netip"
	"path"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/registration"
)

const (
	dumps     = 2                // of all names at once
	admission = 2 * time.Second  // that a dump waits for its turn
	dumpTime  = 30 * time.Second // that a dump may take who asks for it
)

// Controller serves a table as the deployed controller does: each method is as good as another, paths that are not served are 404. Until
// warm, a look-up of a name is 500.
func Controller(t *registration.Table, warm func() bool, observe Observe) http.Handler {
	c := &controller{table: t, warm: warm}
	routes := httpjson.Admit(dumps, admission, http.HandlerFunc(c.routes)).ServeHTTP
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == PathRoutes:
			observe.observed(PathRoutes, w, r, routes)
		case strings.HasPrefix(r.URL.Path, PathRegistration):
			observe.observed(PathRegistration, w, r, c.registration)
		default:
			observe.observed("other", w, r, http.NotFound)
		}
	})
}

type controller struct {
	table *registration.Table
	warm  func() bool
}

func (c *controller) registration(w http.ResponseWriter, r *http.Request) {
	if !c.warm() {
		http.Error(w, "address table is not warm", http.StatusInternalServerError)
		return
	}
	writeJSON(w, http.StatusOK, appendHosts(nil, addressesOf(c.table, path.Base(r.URL.Path))))
}

// appendHosts writes the answer to a look-up. Only the addresses in it mean anything.
func appendHosts(b []byte, addrs []netip.Addr) []byte {
	b = append(b, `{"hosts":[`...)
	for i, a := range addrs {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, `{"ip_address":"`...)
		b = a.AppendTo(b)
		b = append(b, `","last_check_in":"","port":0,"revision":"","service":"","service_repo_name":"","tags":{}}`...)
	}
	return append(b, `],"env":"","service":""}`...)
}

// routes writes all names as they are read: there may be a hundred thousand.
func (c *controller) routes(w http.ResponseWriter, _ *http.Request) {
	// Who reads slowly keeps others from a place; he has until then. A writer that cannot have a deadline is a test's.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(dumpTime))
	w.Header().Set("Content-Type", "application/json")
	out := bufio.NewWriterSize(w, 32<<10)
	b := []byte(`{"addresses":[`)
	comma := false
	for name, addrs := range c.table.Addresses() {
		if comma {
			b = append(b, ',')
		}
		comma = true
		b = append(append(append(b, `{"hostname":"`...), name...), `.","ips":[`...)
		for i, a := range addrs {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(a.AppendTo(append(b, '"')), '"')
		}
		b = append(b, `]}`...)
		if _, err := out.Write(b); err != nil {
			return // who asked has gone
		}
		b = b[:0]
	}
	out.Write(append(b, `]}`...))
	out.Flush()
}

func writeJSON(w http.ResponseWriter, status int, b []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	w.Write(b)
}

// appendText appends s as a JSON string.
func appendText(b []byte, s string) []byte {
	text, err := json.Marshal(s)
	if err != nil { // no string is refused
		text = []byte(`""`)
	}
	return append(b, text...)
}
