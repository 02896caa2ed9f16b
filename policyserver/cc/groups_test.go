package cc_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policyserver/cc"
)

// TestSecurityGroupsOfSeveralPages reads pages in the order in which Cloud Controller gives them, and refuses them when they do not add up.
func TestSecurityGroupsOfSeveralPages(t *testing.T) {
	c := newController(t)
	total := 3
	c.answering(func(w http.ResponseWriter, r *http.Request) bool {
		page, _ := strconv.Atoi(r.URL.Query().Get("page"))
		guid := []string{"zebra", "ape", "cow"}[max(page, 1)-1]
		json.NewEncoder(w).Encode(map[string]any{
			"pagination": map[string]any{"total_results": total, "total_pages": 3},
			"resources":  []any{map[string]any{"guid": guid, "name": guid, "rules": []any{map[string]any{"protocol": "icmp", "destination": "10.0.0.1", "code": 0}}}},
		})
		return true
	})
	asking := client(c, 0)
	got, err := asking.SecurityGroups(t.Context())
	if err != nil || len(got.Records) != 3 || got.Records[0].GUID != "zebra" || got.Records[2].GUID != "cow" {
		t.Fatalf("%+v, %v", got, err)
	}
	if rules := got.Records[0].Rules; strings.Contains(rules, `"type"`) || !strings.Contains(rules, `"code":0`) {
		t.Errorf("a type that is not there became one: %s", rules)
	}
	if len(got.Reasons) != 3 || !strings.Contains(got.Reasons[0], "type is missing") {
		t.Errorf("reasons %q", got.Reasons)
	}
	total = 4
	if _, err := asking.SecurityGroups(t.Context()); !errors.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "3 of 4") {
		t.Errorf("a list that does not add up: %v", err)
	}
}

func TestGroupsStamp(t *testing.T) {
	for answer, want := range map[string]string{
		`{"last_update":"2026-01-02T03:04:05.123456789Z"}`: "2026-01-02T03:04:05.123456789Z", `{"last_update":"2026-01-02T03:04:05+01:00"}`: "2026-01-02T03:04:05+01:00",
		`{"last_update":""}`: "error", `{}`: "error", `{"last_update":5}`: "error", `[]`: "error", "404": "",
	} {
		c := newController(t)
		c.answering(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != "/internal/v4/asg_latest_update" || answer == "404" {
				w.WriteHeader(404)
				return true
			}
			w.Write([]byte(answer))
			return true
		})
		got, err := client(c, 0).GroupsStamp(t.Context())
		if want == "error" && !errors.Is(err, fault.Unavailable) || want != "error" && (err != nil || got != want) {
			t.Errorf("%s: %q, %v", answer, got, err)
		}
	}
}

// FuzzGroups holds that whatever Cloud Controller says of a group becomes a record that can be kept, or nothing.
func FuzzGroups(f *testing.F) {
	f.Add([]byte(`{"guid":"a","name":"n","rules":[{"protocol":"all","destination":"10.0.0.1"}],"globally_enabled":{"running":true},"relationships":{"running_spaces":{"data":[{"guid":"s"}]}}}`))
	f.Add([]byte(`{"guid":"a/b","name":"\u0000"}`))
	f.Add([]byte(`{"guid":"a","rules":[null,{"ports":7}],"relationships":{"staging_spaces":{"data":[{}]}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := cc.ParseGroups(b)
		if err != nil && !errors.Is(err, fault.Unavailable) {
			t.Fatalf("%v is not unavailable", err)
		}
		for _, r := range g.Records {
			if err := r.Validate(); err != nil || !json.Valid([]byte(r.Rules)) {
				t.Fatalf("%+v: %v", r, err)
			}
			if again, problems := r.Group(); len(problems) > 0 && len(g.Reasons) == 0 {
				t.Fatalf("%+v: %v are told nobody", again, problems)
			}
		}
	})
}
