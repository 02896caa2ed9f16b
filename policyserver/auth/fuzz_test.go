package auth

import (
	"context"
	"errors"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

func FuzzTokenFile(f *testing.F) {
	f.Add([]byte(`{"tokens":[{"name":"a","sha256":"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08","groups":["x"]}]}`))
	f.Add([]byte(`{"tokens":[{"name":"a","sha256":"x","admin":true,"groups":[]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		known, err := parseTokens(b)
		if err != nil && (known != nil || !errors.Is(err, fault.Invalid)) {
			t.Fatalf("%v beside %v", known, err)
		}
		for _, k := range known {
			if k.name == "" || len(k.scopes) != 1 || k.groups == nil {
				t.Fatalf("took %+v", k)
			}
		}
	})
}

func FuzzToken(f *testing.F) {
	f.Add("eyJhbGciOiJSUzI1NiIsImtpZCI6Im9uZSJ9.eyJzdWIiOiJ4In0.AAAA")
	f.Add("eyJhbGciOiJub25lIn0.e30.")
	f.Add("..")
	keys := newKeySet(func(context.Context) ([]byte, error) { return []byte(`{"keys":[]}`), nil })
	f.Fuzz(func(t *testing.T, token string) {
		if c, err := verify(t.Context(), keys, token); err == nil {
			t.Fatalf("took %v without a key", c)
		}
	})
}

func FuzzKeys(f *testing.F) {
	f.Add([]byte(`{"keys":[{"kty":"RSA","use":"sig","alg":"RS256","kid":"a","n":"AQAB","e":"AQAB"},{"kty":"MAC","value":"x"}]}`))
	f.Add([]byte(`{"keys":[{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, err := parseKeys(b)
		if err == nil && keys == nil {
			t.Fatal("neither keys nor an error")
		}
		for _, k := range keys {
			if !k.Valid() || !k.IsPublic() {
				t.Fatalf("took %+v", k)
			}
		}
	})
}

func FuzzClaims(f *testing.F) {
	f.Add([]byte(`{"sub":"x","scope":["a"],"exp":1700000000,"realm":{"roles":"a b"}}`))
	f.Fuzz(func(_ *testing.T, b []byte) {
		c, err := parseClaims(b)
		if err != nil {
			return
		}
		c.list("scope")
		c.list("realm.roles")
		c.text("sub")
		c.validAt(time.Now())
	})
}
