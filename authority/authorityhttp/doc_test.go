package authorityhttp_test

import (
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestTheDocumentTellsTheTruth runs the requests of docs/api/certificates.md and compares the answers.
func TestTheDocumentTellsTheTruth(t *testing.T) {
	w := serve(t)
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: w.tls(t, "host", own, idle)}}
	defer c.CloseIdleConnections()
	for _, e := range testkit.ReadExamples(t, "../../docs/api/certificates.md", 6) {
		req, err := http.NewRequestWithContext(t.Context(), e.Method, w.URL+e.Path, strings.NewReader(e.Body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		status, answer, _ := strings.Cut(e.Answer, "\n")
		if strconv.Itoa(resp.StatusCode) != status {
			t.Errorf("%s: answer %d %s, want %s", e.Line, resp.StatusCode, got, status)
		}
		if answer == "" {
			if string(got) != string(w.root.Bundle().PEM()) || resp.Header.Get("Content-Type") != "application/x-pem-file" {
				t.Errorf("%s: %s", e.Line, got)
			}
			continue
		}
		if diff := cmp.Diff(parse(t, answer), settled(t, w, parse(t, string(got)))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", e.Line, diff)
		}
	}
}

// settled checks what differs each time and gives it the names of the document.
func settled(t *testing.T, w *world, got map[string]string) map[string]string {
	t.Helper()
	if got["certificates"] == "" {
		return got
	}
	chain, err := authority.ParseCertificates([]byte(got["certificates"]))
	if err != nil || len(chain) != 2 || !chain[1].Equal(w.root.Certificate()) || chain[0].CheckSignatureFrom(chain[1]) != nil {
		t.Fatalf("chain %v, %v", chain, err)
	}
	if expires, err := time.Parse(time.RFC3339, got["expires"]); err != nil || !expires.Equal(chain[0].NotAfter) {
		t.Errorf("expires %s, %v, want %v", got["expires"], err, chain[0].NotAfter)
	}
	if got["roots"] != string(w.root.Bundle().PEM()) {
		t.Errorf("roots %s", got["roots"])
	}
	got["certificates"], got["roots"], got["expires"] = "CERTIFICATES", "ROOTS", "EXPIRES"
	return got
}

func parse(t *testing.T, s string) map[string]string {
	t.Helper()
	var v map[string]string
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	return v
}
