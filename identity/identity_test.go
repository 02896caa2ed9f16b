package identity_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
)

func TestGroupValidate(t *testing.T) {
	for _, g := range []identity.Group{"a", "c8b6a0b5-2d9f-4d0e-9e5c-0d6b6c5d3c11", "with space", "größe", "名", identity.Group(strings.Repeat("x", 255)), identity.IngressRouter} {
		if err := g.Validate(); err != nil {
			t.Errorf("%q: %v", string(g), err)
		}
	}
	for _, g := range []identity.Group{"", "a,b", "a\nb", "a\x00", "\xff", "tab\t", "\u2028", identity.Group(strings.Repeat("x", 256)), identity.Group(strings.Repeat("é", 128))} {
		if err := g.Validate(); !errors.Is(err, fault.Invalid) {
			t.Errorf("%q: %v, want an Invalid fault", string(g), err)
		}
	}
}

func TestTagText(t *testing.T) {
	for _, c := range []struct {
		tag    identity.Tag
		length int
		text   string
	}{{1, 1, "01"}, {255, 1, "FF"}, {256, 1, "100"}, {1, 2, "0001"}, {0xab, 2, "00AB"}, {65535, 2, "FFFF"}, {65535, 3, "00FFFF"}} {
		if got := c.tag.Text(c.length); got != c.text {
			t.Errorf("tag %d of length %d is %q, want %q", c.tag, c.length, got, c.text)
		}
		for _, text := range []string{c.text, strings.ToLower(c.text)} {
			if got, err := identity.ParseTag(text); err != nil || got != c.tag {
				t.Errorf("ParseTag(%q) = %d, %v, want %d", text, got, err, c.tag)
			}
		}
	}
	for _, s := range []string{"", "0", "0000", "10000", "00010000", "-1", "+1", "0x1", "g", " 1", "000000001", "1_0"} {
		if got, err := identity.ParseTag(s); !errors.Is(err, fault.Invalid) {
			t.Errorf("ParseTag(%q) = %d, %v, want an Invalid fault", s, got, err)
		}
	}
	if a, b := identity.MaxTagOf(1), identity.MaxTagOf(2); a != 255 || b != 65535 || identity.MaxTagOf(3) != 65535 {
		t.Errorf("the highest tags are %d and %d", a, b)
	}
}

func TestTagJSON(t *testing.T) {
	for text, want := range map[string]identity.Tag{`""`: 0, `"0001"`: 1, `"FFFF"`: 65535} {
		var tag identity.Tag
		if err := json.Unmarshal([]byte(text), &tag); err != nil || tag != want {
			t.Errorf("%s is %d, %v", text, tag, err)
		}
		if b, err := json.Marshal(tag); err != nil || string(b) != text {
			t.Errorf("%d is written %s, %v", tag, b, err)
		}
	}
	tag := identity.Tag(7)
	if err := json.Unmarshal([]byte(`"x"`), &tag); err == nil || tag != 7 {
		t.Errorf("a bad tag became %d, %v", tag, err)
	}
}

func FuzzParseTag(f *testing.F) {
	for _, s := range []string{"", "1", "00FF", "ffff", "10000", "0_1", "+F"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		tag, err := identity.ParseTag(s)
		if err != nil {
			return
		}
		if again, err := identity.ParseTag(tag.Text(2)); err != nil || again != tag || tag == 0 {
			t.Fatalf("%q is tag %d, read again %d, %v", s, tag, again, err)
		}
		if strings.Trim(strings.ToUpper(s), "0123456789ABCDEF") != "" {
			t.Fatalf("%q is taken for tag %d", s, tag)
		}
	})
}

func FuzzGroupValidate(f *testing.F) {
	for _, s := range []string{"", "a", "a,b", "\xff", "\u202e", " "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if identity.Group(s).Validate() == nil && (s == "" || len(s) > identity.MaxGroup || strings.ContainsAny(s, ",\n\r\t\x00\x1b")) {
			t.Fatalf("%q passes", s)
		}
	})
}
