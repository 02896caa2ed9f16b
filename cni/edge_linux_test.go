package cni_test

import (
	"encoding/json"
	"path/filepath"
	"testing"

	"code.cloudfoundry.org/silk/endpoint"
)

func (h *host) record(c container) endpoint.Record {
	h.t.Helper()
	d, err := endpoint.Open(filepath.Join(h.dir, "endpoints"))
	if err != nil {
		h.t.Fatal(err)
	}
	r, err := d.Lookup(endpoint.Key{Network: "silk", Container: c.id, Interface: "eth0"})
	if err != nil {
		h.t.Fatal(err)
	}
	return r
}

func TestEgressRulesAreRecorded(t *testing.T) {
	h := newHost(t)
	for id, rules := range map[string]string{"none": `null`, "empty": `[]`, "one": `[{"protocol":1,"networks":[{"start":"10.0.0.1","end":"10.0.0.9"}],"ports":[{"start":80,"end":80}]}]`} {
		c := h.container(id)
		h.add(c, "runtimeConfig", json.RawMessage(`{"netOutRules":`+rules+`}`))
		want := rules
		if rules == "null" {
			want = ""
		}
		if got := h.record(c).NetOut; string(got) != want || (got == nil) != (want == "") {
			t.Errorf("rules %s are recorded as %q", rules, got)
		}
		h.del(c, "runtimeConfig", json.RawMessage(`{"netOutRules":7}`)) // what undoes does not judge
	}
}
