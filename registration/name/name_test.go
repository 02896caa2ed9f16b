package name_test

import (
	"errors"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration/name"
)

func FuzzParse(f *testing.F) {
	for _, s := range []string{"Api.Apps.Internal.", "*.a", "a_b-c.1", "*", "-a", "a..b", strings.Repeat("a", 64), strings.Repeat("a.", 130)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := name.Parse(s)
		if err != nil {
			if !errors.Is(err, fault.Invalid) {
				t.Fatalf("%q: %v, want fault.Invalid", s, err)
			}
			return
		}
		if again, err := name.Parse(string(n)); err != nil || again != n || len(n) > name.Max || strings.TrimSuffix(strings.ToLower(s), ".") != string(n) {
			t.Fatalf("%q became %q, which becomes %q, %v", s, n, again, err)
		}
		if !n.Below(n) || ("a."+n).Below(n) != true || ("a" + n).Below(n) {
			t.Fatalf("what is below %q", n)
		}
	})
}
