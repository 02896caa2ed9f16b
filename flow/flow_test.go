package flow_test

import (
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/flow"
)

func TestPrefix(t *testing.T) {
	for _, c := range []struct {
		v            flow.Verdict
		s            flow.Scope
		detail, want string
	}{
		{flow.Accepted, flow.C2C, "", "silk ok c2c "},
		{flow.Denied, flow.C2C, "no-policy", "silk deny c2c no-policy "},
		{flow.Accepted, flow.Egress, "public networks", "silk ok egress public_networks "},
		{flow.Denied, flow.Rate, "", "silk deny rate "},
		{flow.Denied, flow.Host, "a\"b\\c*d\n\u00e9", "silk deny host a_b_c_d__ "},
		{flow.Denied, flow.Egress, strings.Repeat("x", 300), "silk deny egress " + strings.Repeat("x", 109) + " "},
	} {
		got := flow.Prefix(c.v, c.s, c.detail)
		if got != c.want {
			t.Errorf("prefix of %v %v %q is %q, want %q", c.v, c.s, c.detail, got, c.want)
		}
		if len(got) > flow.MaxPrefix {
			t.Errorf("prefix %q has %d bytes", got, len(got))
		}
		v, s, detail, ok := flow.ParsePrefix(got)
		if !ok || v != c.v || s != c.s || flow.Prefix(v, s, detail) != got {
			t.Errorf("prefix %q reads as %v %v %q, %v", got, v, s, detail, ok)
		}
	}
	for _, p := range []string{"", "silk", "silk ok", "silk maybe c2c ", "silk ok moon ", "OK_0001_guid ", "silk ok c2c a b "} {
		if v, s, detail, ok := flow.ParsePrefix(p); ok {
			t.Errorf("prefix %q reads as %v %v %q", p, v, s, detail)
		}
	}
}

func FuzzParsePrefix(f *testing.F) {
	for _, p := range []string{"silk ok c2c ", "silk deny c2c no-policy ", "silk deny egress web ", "silk deny rate", "silk  ", ""} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p string) {
		v, s, detail, ok := flow.ParsePrefix(p)
		if !ok {
			return
		}
		again := flow.Prefix(v, s, detail)
		if v2, s2, _, ok := flow.ParsePrefix(again); !ok || v2 != v || s2 != s || len(again) > flow.MaxPrefix {
			t.Errorf("%q is written again as %q", p, again)
		}
	})
}
