package registrationhttp_test

import (
	"encoding/json"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/registration"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

// TestTheDocumentTellsTheTruth runs the requests of docs/api/names.md, each against the API under whose heading it stands, and compares
// the answers byte by byte.
func TestTheDocumentTellsTheTruth(t *testing.T) {
	doc, err := os.ReadFile("../../docs/api/names.md")
	if err != nil {
		t.Fatal(err)
	}
	table := registration.NewTable()
	register(table, "api.apps.internal", "10.255.1.5", 0)
	register(table, "api.apps.internal", "10.255.2.7", 1)
	register(table, "1.api.apps.internal", "10.255.2.7", 1)
	register(table, "*.web.apps.internal", "10.255.1.9", -1)
	apis := map[string]http.Handler{
		"The controller":          registrationhttp.Controller(table, yes, nil),
		"The adapter":             registrationhttp.Adapter(registrationhttp.OfTable(table, yes), discard, registrationhttp.AdapterOptions{}),
		"From addresses to names": registrationhttp.NamesHandler(table, yes),
	}
	for _, part := range strings.Split(string(doc), "\n## ")[1:] {
		heading, _, _ := strings.Cut(part, ":")
		if apis[heading] == nil {
			t.Fatalf("%q is no API", heading)
		}
		for _, e := range testkit.Examples(t, part, 2) {
			status, body, _ := strings.Cut(e.Answer, "\n")
			w := ask(t, apis[heading], e.Method, e.Path)
			if strconv.Itoa(w.Code) != status || strings.TrimSuffix(w.Body.String(), "\n") != body {
				t.Errorf("%s: %d %s\nwant %s %s", e.Line, w.Code, w.Body, status, body)
			}
			if strings.HasPrefix(body, "{") && !json.Valid(w.Body.Bytes()) {
				t.Errorf("%s: no JSON: %s", e.Line, w.Body)
			}
		}
	}
}
