package registration_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
)

func FuzzParseName(f *testing.F) {
	for _, s := range []string{"a", "Api.Apps.Internal.", "*.a", "0.a_b", "", "..", "a..b", "é.b", strings.Repeat("a.", 127) + "a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := registration.ParseName(s)
		if err != nil {
			if !errors.Is(err, fault.Invalid) || n != "" {
				t.Fatalf("%q: %q, %v", s, n, err)
			}
			return
		}
		if again, err := registration.ParseName(string(n)); err != nil || again != n {
			t.Fatalf("%q is %q, and that is %q, %v", s, n, again, err)
		}
		if string(n) != strings.ToLower(strings.TrimSuffix(s, ".")) || len(n) > registration.MaxName {
			t.Fatalf("%q is %q", s, n)
		}
		table := registration.NewTable()
		r := reg(string(n), "10.0.0.1", -1)
		table.Register(r)
		if list, ok := table.Lookup(n); !ok || list[0].Name != n {
			t.Fatalf("%q is not found: %v", n, list)
		}
		if table.Unregister(n, r.Address); table.Standing([]byte(n)) != registration.Absent {
			t.Fatalf("something of %q is left", n)
		}
	})
}

// deployed is what the deployed controller reads of a message.
type deployed struct {
	Host    string   `json:"host"`
	URIs    []string `json:"uris"`
	Updated int64    `json:"endpoint_updated_at_ns"`
}

func FuzzParseMessage(f *testing.F) {
	for _, s := range messages {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var w deployed
		bad := json.Unmarshal(b, &w) != nil || len(w.URIs) == 0
		m, err := registration.ParseUnregister(b)
		switch {
		case fault.Of(err) == fault.Exhausted:
			return
		case bad != (err != nil), err != nil && fault.Of(err) != fault.Invalid:
			t.Fatalf("%s: %v, the deployed controller refuses it: %v", b, err, bad)
		}
		if err != nil {
			return
		}
		r, err := registration.ParseMessage(b)
		if err != nil && m.Host.IsValid() || err == nil && !m.Host.IsValid() {
			t.Fatalf("%s: registers %v and removes %v, %v", b, r, m, err)
		}
		table, n := registration.NewTable(), 0
		for r, err := range m.Registrations(start) {
			n++
			if err != nil {
				continue
			}
			if _, err := table.Add(r); err != nil && m.Host.IsValid() {
				t.Fatalf("%s: %v", b, err)
			}
		}
		if n != len(w.URIs) {
			t.Fatalf("%s: %d registrations", b, n)
		}
	})
}

func FuzzDecode(f *testing.F) {
	for seed := range uint64(3) {
		table, _ := randomTable(seed, 10*int(seed), start)
		f.Add(encode(f, table, start, start))
	}
	f.Add([]byte("silk names 1\n\x00\x01a\x01\x04\x0a\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		table, taken, err := registration.Decode(bytes.NewReader(b), registration.Limits{}, everywhere, start)
		if err != nil {
			if !errors.Is(err, fault.Invalid) || table != nil {
				t.Fatal(err)
			}
			return
		}
		again, _, err := registration.Decode(bytes.NewReader(encode(t, table, taken, start)), registration.Limits{}, everywhere, start)
		if err != nil {
			t.Fatal(err)
		}
		if n, all := table.Len(); len(again.Names()) != n || !bytes.Equal(encode(t, table, taken, start), encode(t, again, taken, start)) {
			t.Fatalf("%d names and %d registrations came back as others", n, all)
		}
	})
}
