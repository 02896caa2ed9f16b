package registrationhttp_test

import (
	"encoding/json"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/registration"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

var example = regexp.MustCompile("(?s)```http\n(.*?)```")

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
		examples := example.FindAllStringSubmatch(part, -1)
		if apis[heading] == nil || len(examples) < 2 {
			t.Fatalf("%q has %d examples", heading, len(examples))
		}
		for _, m := range examples {
			line, answer, _ := strings.Cut(m[1], "\n\n")
			method, target, _ := strings.Cut(line, " ")
			status, body, _ := strings.Cut(strings.TrimSuffix(answer, "\n"), "\n")
			w := ask(t, apis[heading], method, target)
			if strconv.Itoa(w.Code) != status || strings.TrimSuffix(w.Body.String(), "\n") != body {
				t.Errorf("%s: %d %s\nwant %s %s", line, w.Code, w.Body, status, body)
			}
			if strings.HasPrefix(body, "{") && !json.Valid(w.Body.Bytes()) {
				t.Errorf("%s: no JSON: %s", line, w.Body)
			}
		}
	}
}
