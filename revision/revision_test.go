package revision_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/revision"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]revision.Revision{
		"":                             {},
		"a.0":                          {Epoch: "a"},
		"0f-Z.7":                       {Epoch: "0f-Z", Counter: 7},
		"e.18446744073709551615":       {Epoch: "e", Counter: 1<<64 - 1},
		strings.Repeat("x", 64) + ".1": {Epoch: strings.Repeat("x", 64), Counter: 1},
	} {
		r, err := revision.Parse(text)
		if err != nil || r != want {
			t.Errorf("Parse(%q) = %+v, %v, want %+v", text, r, err, want)
		}
		if r.String() != text {
			t.Errorf("%+v is written %q, want %q", r, r, text)
		}
		if r.IsZero() != (text == "") {
			t.Errorf("%+v: IsZero is %v", r, r.IsZero())
		}
	}
	for _, text := range []string{"a", ".", ".1", "a.", "a.-1", "a.+1", "a.1.2", "a b.1", "a\n.1", "é.1", "a.18446744073709551616", strings.Repeat("x", 65) + ".1", "a.1 ", "a.0x1"} {
		if r, err := revision.Parse(text); !errors.Is(err, fault.Invalid) {
			t.Errorf("Parse(%q) = %+v, %v, want an Invalid fault", text, r, err)
		}
	}
}

func TestJSON(t *testing.T) {
	type message struct{ At revision.Revision }
	for text, want := range map[string]message{`{"At":""}`: {}, `{"At":"e.3"}`: {revision.Revision{Epoch: "e", Counter: 3}}} {
		var m message
		if err := json.Unmarshal([]byte(text), &m); err != nil || m != want {
			t.Errorf("%s is %+v, %v", text, m, err)
		}
		if b, err := json.Marshal(m); err != nil || string(b) != text {
			t.Errorf("%+v is written %s, %v", m, b, err)
		}
	}
	m := message{revision.Revision{Epoch: "kept", Counter: 1}}
	if err := json.Unmarshal([]byte(`{"At":"e"}`), &m); err == nil || m.At.Epoch != "kept" {
		t.Errorf("a bad revision became %+v, %v", m, err)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"", "a.1", "-.0", "a.01", "a..1", "\x00.1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := revision.Parse(s)
		if err != nil {
			if !errors.Is(err, fault.Invalid) || !r.IsZero() {
				t.Fatalf("Parse(%q) = %+v, %v", s, r, err)
			}
			return
		}
		if again, err := revision.Parse(r.String()); err != nil || again != r {
			t.Fatalf("%q is %+v, written %q, read %+v, %v", s, r, r, again, err)
		}
	})
}
