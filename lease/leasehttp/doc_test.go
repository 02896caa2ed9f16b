package leasehttp_test

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
)

// TestTheDocumentTellsTheTruth runs the requests of docs/api/leases.md and compares the answers.
func TestTheDocumentTellsTheTruth(t *testing.T) {
	s := serve(t, openSQLite(t, "10.255.0.0/16", 24), leasehttp.HandlerOptions{})
	names := strings.NewReplacer() // of the document -> what they stand for
	for _, e := range testkit.ReadExamples(t, "../../docs/api/leases.md", 10) {
		settle(t, s)
		req, err := http.NewRequest(e.Method, s.URL+names.Replace(e.Path), strings.NewReader(e.Body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := s.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		names = learn(t, names, got)
		status, want, _ := strings.Cut(names.Replace(e.Answer), "\n")
		if strconv.Itoa(resp.StatusCode) != status {
			t.Errorf("%s: answer %d %s, want %s", e.Line, resp.StatusCode, got, status)
		}
		if want == "" {
			continue
		}
		if diff := cmp.Diff(parse(t, want), parse(t, string(got))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", e.Line, diff)
		}
	}
}

// learn takes the names EPOCH and SUM from the first full update that is answered.
func learn(t *testing.T, names *strings.Replacer, body []byte) *strings.Replacer {
	var u struct {
		Revision string
		Full     bool
		Sum      string
	}
	if json.Unmarshal(body, &u) != nil || !u.Full {
		return names
	}
	r, err := lease.ParseRevision(u.Revision)
	if err != nil {
		t.Fatal(err)
	}
	// The document counts revisions from 1, whatever the empty database began with.
	plus := func(n uint64) string { return r.Epoch + "." + strconv.FormatUint(r.Counter+n, 10) }
	return strings.NewReplacer("EPOCH.1", plus(0), "EPOCH.2", plus(1), "SUM", u.Sum)
}

// settle waits until watchers are shown what the list shows; changes are shown to them a little later.
func settle(t *testing.T, s *httptest.Server) {
	t.Helper()
	for start := time.Now(); ; {
		var list struct{ Leases []any }
		var u struct{ Count int }
		_, a := ask(t, s.Client(), "GET", s.URL+leasehttp.PathLeases, "")
		_, b := ask(t, s.Client(), "GET", s.URL+leasehttp.PathWatch, "")
		if err := errors.Join(json.Unmarshal([]byte(a), &list), json.Unmarshal([]byte(b), &u)); err != nil {
			t.Fatal(err)
		}
		if len(list.Leases) == u.Count {
			return
		}
		if time.Since(start) > 10*time.Second {
			t.Fatalf("watch shows %d leases, the list %d", u.Count, len(list.Leases))
		}
	}
}

func parse(t *testing.T, s string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	return v
}
