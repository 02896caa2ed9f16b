package registrationhttp

import (
	"testing"

	"code.cloudfoundry.org/silk/registration"
)

// FuzzLookupAnswer: what a server sends is addresses, or an error.
func FuzzLookupAnswer(f *testing.F) {
	for _, s := range []string{
		string(appendHosts(nil, nil)), `{"hosts":[{"ip_address":"10.255.0.5"},{"ip_address":"x"}]}`, `{"hosts":null}`, `{}`, `[]`, `null`, ``, `{"HOSTS":[{"IP_ADDRESS":"fd00::1"}]}`,
		`{"hosts":[{"ip_address":"x"}]}`, `{"hosts":[{}]}`, `{"hosts":[{"ip_address":7}]}`, `{"hosts":[{"ip_address":"fe80::1%eth0"}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		addrs, err := decodeHosts(b)
		if err != nil && addrs != nil || err == nil && addrs == nil {
			t.Fatalf("%s: %v, %v", b, addrs, err)
		}
		for _, a := range addrs {
			if !a.IsValid() || a.Zone() != "" || a.Is4In6() {
				t.Fatalf("%s: %v", b, a)
			}
		}
		if err != nil {
			return
		}
		if again, err := decodeHosts(appendHosts(nil, addrs)); err != nil || len(again) != len(addrs) {
			t.Fatalf("%v came back as %v, %v", addrs, again, err)
		}
	})
}

// FuzzNamesAnswer: no text that is no name comes out.
func FuzzNamesAnswer(f *testing.F) {
	for _, s := range []string{
		`{"revision":"1","names":{"10.255.0.1":["a"]}}`, `{"revision":"1","names":{}}`, `{"revision":"","names":{}}`, `{"revision":"\"","names":{}}`, `{"revision":"1"}`, `{}`, `[]`,
		`{"revision":"1","names":{"x":["a"]}}`, `{"revision":"1","names":{"10.255.0.1":["A"]}}`, `{"revision":"1","names":{"":["a"]}}`, `{"revision":"1","names":{"10.255.0.1":null}}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := decodeNames(b)
		if err != nil {
			if a.Names != nil || a.Revision != "" {
				t.Fatalf("%s: %v, %v", b, a, err)
			}
			return
		}
		for _, names := range a.Names {
			for _, n := range names {
				if p, err := registration.ParseName(string(n)); err != nil || p != n {
					t.Fatalf("%s: name %q", b, n)
				}
			}
		}
	})
}
