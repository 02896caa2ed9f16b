package policyhttp_test

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// cf sends what Cloud Foundry's command line sends: its headers, its bodies.
func cf(t *testing.T, a *api, method, path, body string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, a.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "cf/9.0.0 (go1.26; amd64 linux)")
	req.Header.Set("Authorization", "bearer dev")
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return send(t, a.Server, req)
}

// TestRequestsOfTheCommandLine replays each request that cf add-network-policy, network-policies and remove-network-policy send.
func TestRequestsOfTheCommandLine(t *testing.T) {
	a := start(t)
	const src, dst = "my-0b2fc36f-e53a-42a2-b5ca-9b4f0f4f1d1a", "my-8d2e5a5c-52f9-4a06-9f41-2d43b1a6d9b5"
	add := func(protocol, ports string) answer {
		return cf(t, a, "POST", policies, body(item(src, dst, protocol, ports)))
	}
	// add-network-policy without flags, with a port, with a range; twice, as after an error of the transport.
	for _, c := range [][2]string{{"tcp", "8080"}, {"udp", "53"}, {"tcp", "9000-9010"}, {"tcp", "8080"}} {
		if got := add(c[0], c[1]); got.code >= 400 {
			t.Errorf("add-network-policy %v: %d %s", c, got.code, got.body)
		}
	}
	// Mistakes that the command leaves to the server are shown as the text under "error".
	got := add("tcp", "9010-9000")
	var e struct {
		Error string `json:"error"`
	}
	if err := json.Unmarshal([]byte(got.body), &e); err != nil || got.code != 400 || e.Error == "" || got.header.Get("X-Vcap-Request-Id") == "" {
		t.Errorf("add-network-policy with a range that runs backwards: %d %s %v", got.code, got.body, err)
	}
	// network-policies --source asks with 200 GUIDs at a time, commas escaped, and keeps what has them as source.
	ids := make([]string, 200)
	for i := range ids {
		ids[i] = src + strings.Repeat("x", i)
	}
	got = cf(t, a, "GET", policies+"?"+url.Values{"id": {strings.Join(ids, ",")}}.Encode(), "")
	var list struct {
		Policies []struct {
			Source      struct{ ID string }
			Destination struct {
				ID, Protocol string
				Ports        struct{ Start, End int }
			}
		}
	}
	if err := json.Unmarshal([]byte(got.body), &list); err != nil || got.code != 200 || len(list.Policies) != 3 {
		t.Fatalf("network-policies: %d %s %v, want three policies", got.code, got.body, err)
	}
	// remove-network-policy lists, looks for exactly its policy, and sends that back.
	removed := false
	for _, p := range list.Policies {
		if p.Source.ID == src && p.Destination.ID == dst && p.Destination.Protocol == "tcp" && p.Destination.Ports.Start == 9000 && p.Destination.Ports.End == 9010 {
			got := cf(t, a, "POST", remove, body(item(src, dst, "tcp", "9000-9010")))
			removed = got.code < 400
		}
	}
	if !removed {
		t.Errorf("remove-network-policy found nothing to remove in %s", got.body)
	}
	want(t, "network-policies", cf(t, a, "GET", policies+"?id="+src, ""), 200, listed(item(src, dst, "tcp", "8080"), item(src, dst, "udp", "53")))
	// What the user may not do is a 403 with a text.
	want(t, "add-network-policy to a foreign app", cf(t, a, "POST", policies, body(item(src, "foreign", "tcp", "8080"))), 403,
		`{"error": "one or more applications cannot be found or accessed"}`)
}
