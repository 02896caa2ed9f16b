package policyhttp_test

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/revision"
)

// TestTheDocumentTellsTheTruth runs the requests of the pages in docs/api and compares the answers.
func TestTheDocumentTellsTheTruth(t *testing.T) {
	for page, least := range map[string]int{"policies.md": 10, "security-groups.md": 8} {
		t.Run(page, func(t *testing.T) { tellsTheTruth(t, page, least) })
	}
}

func tellsTheTruth(t *testing.T, page string, least int) {
	s := start(t).Server
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
	for _, e := range testkit.ReadExamples(t, "../../docs/api/"+page, least) {
		got := ask(t, s, "admin", e.Line, names.Replace(e.Body))
		learn(got.body)
		status, want, _ := strings.Cut(names.Replace(e.Answer), "\n")
		if strconv.Itoa(got.code) != status {
			t.Errorf("%s: answer %d %s, want %s", e.Line, got.code, got.body, status)
		}
		if want == "" {
			continue
		}
		if diff := cmp.Diff(parse(t, want), parse(t, got.body)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", e.Line, diff)
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
