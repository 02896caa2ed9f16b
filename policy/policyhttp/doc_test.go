package policyhttp_test

import (
	"encoding/json"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"code.cloudfoundry.org/silk/revision"
)

var example = regexp.MustCompile("(?s)```http\n(.*?)\n```")

// TestTheDocumentTellsTheTruth runs the requests of the pages in docs/api and compares the answers.
func TestTheDocumentTellsTheTruth(t *testing.T) {
	for page, least := range map[string]int{"policies.md": 10, "security-groups.md": 8} {
		t.Run(page, func(t *testing.T) { tellsTheTruth(t, page, least) })
	}
}

func tellsTheTruth(t *testing.T, page string, least int) {
	doc, err := os.ReadFile("../../docs/api/" + page)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t).Server
	examples := example.FindAllStringSubmatch(string(doc), -1)
	if len(examples) < least {
		t.Fatalf("found %d examples in the document", len(examples))
	}
	names := strings.NewReplacer("SET", setOf("api"))
	learn := func(body string) {
		var u struct {
			Revision revision.Revision
			Sum      string
		}
		if json.Unmarshal([]byte(body), &u) != nil || u.Revision.IsZero() {
			return
		}
		// The document counts revisions as it changes policies, whatever the empty database began with.
		names = strings.NewReplacer("SET", setOf("api"), "EPOCH.2", u.Revision.String(), "EPOCH.3", u.Revision.String(), "SUM", u.Sum)
	}
	for _, m := range examples {
		request, want, _ := strings.Cut(m[1], "\n\n")
		line, body, _ := strings.Cut(request, "\n")
		got := ask(t, s, "admin", line, names.Replace(body))
		learn(got.body)
		status, want, _ := strings.Cut(strings.TrimSpace(names.Replace(want)), "\n")
		if strconv.Itoa(got.code) != status {
			t.Errorf("%s: answer %d %s, want %s", line, got.code, got.body, status)
		}
		if want == "" {
			continue
		}
		if diff := cmp.Diff(parse(t, want), parse(t, got.body)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", line, diff)
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
