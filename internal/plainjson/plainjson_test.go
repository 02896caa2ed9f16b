package plainjson_test

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/plainjson"
	"github.com/google/go-cmp/cmp"
)

type member struct{ Name, Value string }

func members(b []byte) (list []member, ok bool) {
	ok = plainjson.Each(b, func(name string, value []byte) bool {
		list = append(list, member{name, string(value)})
		return true
	})
	return list, ok
}

// library is members by encoding/json.
func library(b []byte) (list []member, ok bool) {
	d := json.NewDecoder(bytes.NewReader(b))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, false
	}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, false
		}
		var v json.RawMessage
		if err := d.Decode(&v); err != nil {
			return nil, false
		}
		list = append(list, member{t.(string), string(v)})
	}
	return list, json.Valid(b)
}

func TestEach(t *testing.T) {
	for in, want := range map[string][]member{
		`{}`:            nil,
		" \n{ \t} ":     nil,
		`{"a":1,"a":2}`: {{"a", "1"}, {"a", "2"}},
		`{ "a" : [1, {"x":"]}\""}] , "b" : "}\\" ,"c":null,"d":{"e":[]},"f":-1.5e3}`: {{"a", `[1, {"x":"]}\""}]`}, {"b", `"}\\"`}, {"c", "null"}, {"d", `{"e":[]}`}, {"f", "-1.5e3"}},
	} {
		got, ok := members([]byte(in))
		if !ok {
			t.Errorf("%s is not plain", in)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s (-want +got):\n%s", in, d)
		}
	}
	for _, in := range []string{``, ` `, `[]`, `"a"`, `null`, `{"a":1`, `{"a":1}}`, `{"\u0061":1}`, `{"ä":1}`, `{"a" 1}`, `{,}`} {
		if _, ok := members([]byte(in)); ok {
			t.Errorf("%s is plain", in)
		}
	}
	if plainjson.Each([]byte(`{"a":1,"b":2}`), func(name string, _ []byte) bool { return name == "a" }) {
		t.Error("a member that fn refused passed")
	}
}

func TestElements(t *testing.T) {
	elements := func(in string) (list []string, ok bool) {
		ok = plainjson.Elements([]byte(in), func(v []byte) bool { list = append(list, string(v)); return true })
		return list, ok
	}
	for in, want := range map[string][]string{
		`[]`: nil, " \n[ \t] ": nil, `[1]`: {"1"}, ` [ {"a":[1,2]} , "],\"" ,[ ], null]`: {`{"a":[1,2]}`, `"],\""`, `[ ]`, `null`},
	} {
		if got, ok := elements(in); !ok || !slices.Equal(got, want) {
			t.Errorf("%s has the elements %q, %v, want %q", in, got, ok, want)
		}
	}
	for _, in := range []string{``, ` `, `{}`, `"a"`, `[`, `[1`, `[1]]`, `[1,]`, `[1 2]`, `[,]`} {
		if _, ok := elements(in); ok {
			t.Errorf("%s is an array", in)
		}
	}
	if plainjson.Elements([]byte(`[1,2]`), func(v []byte) bool { return string(v) == "1" }) {
		t.Error("an element that fn refused passed")
	}
}

func FuzzElements(f *testing.F) {
	f.Add([]byte(` [ {"a":[1,2]} , "],\"" ,[ ], null]`))
	f.Add([]byte(`[[}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var got []string
		if !plainjson.Elements(b, func(v []byte) bool { got = append(got, string(v)); return true }) {
			return
		}
		var list []json.RawMessage
		if err := json.Unmarshal(b, &list); err != nil {
			t.Fatalf("%q: %v", b, err)
		}
		if !slices.EqualFunc(got, list, func(a string, b json.RawMessage) bool { return a == string(b) }) {
			t.Fatalf("%q has the elements %q, by encoding/json %q", b, got, list)
		}
	})
}

func FuzzEach(f *testing.F) {
	f.Add([]byte(`{ "a" : [1, {"x":"]}\""}] , "b" : "}\\" ,"c":null,"d":{"e":[]},"f":-1.5e3}`))
	f.Add([]byte(`{"cniVersion":"1.0.0","daemonPort":23954}` + "\n"))
	f.Add([]byte(`{"a":{"b":[}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, ok := members(b)
		if !ok {
			return
		}
		want, valid := library(b)
		if !valid || !slices.Equal(got, want) {
			t.Fatalf("%q gave %q, encoding/json %q, %v", b, got, want, valid)
		}
		for _, m := range got {
			var s string
			if text, ok := plainjson.Text([]byte(m.Value)); ok && (json.Unmarshal([]byte(m.Value), &s) != nil || s != text) {
				t.Fatalf("%s became %q, encoding/json %q", m.Value, text, s)
			}
			var n int
			if number, ok := plainjson.Int([]byte(m.Value)); ok && (json.Unmarshal([]byte(m.Value), &n) != nil || n != number) {
				t.Fatalf("%s became %d, encoding/json %d", m.Value, number, n)
			}
		}
	})
}

// TestDepth: what is nested deeper than anything plain is left to encoding/json.
func TestDepth(t *testing.T) {
	for depth, want := range map[int]bool{1: true, 60: true, 70: false, 1 << 20: false} {
		in := `{"a":` + strings.Repeat("[", depth) + strings.Repeat("]", depth) + `}`
		if _, ok := members([]byte(in)); ok != want {
			t.Errorf("depth %d: plain %v, want %v", depth, ok, want)
		}
	}
}

// FuzzValid: what passes for JSON here does so there, and the other way round unless it is deeply nested.
func FuzzValid(f *testing.F) {
	for _, s := range []string{
		`1`, `-0.5e+10`, `01`, `-`, `1.`, `1e`, `.5`, `"\u00e4\n\""`, `"\x"`, `"\u12"`, "\"\x1f\"", "\"\xff\"", `tru`, `true`, `null `, `[1,2,]`, `[1 2]`, `{"a"}`, `{"a":1,}`, `{1:2}`, "\v1", `[[]]`, `"`, `[`, "{}\x00",
	} {
		f.Add([]byte(s))
		f.Add([]byte(`{"a":` + s + `}`))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ok := plainjson.Each(b, func(string, []byte) bool { return true })
		if ok && !json.Valid(b) {
			t.Fatalf("%q is not valid", b)
		}
		if ok || bytes.Count(b, []byte("[")) > 30 || bytes.Count(b, []byte("{")) > 30 || bytes.Contains(b, []byte(`\`)) {
			return
		}
		odd := func(m member) bool {
			return strings.ContainsFunc(m.Name, func(r rune) bool { return r < ' ' || r > '~' })
		}
		if list, valid := library(b); valid && !slices.ContainsFunc(list, odd) {
			t.Fatalf("%q is valid", b)
		}
	})
}

func TestIndent(t *testing.T) {
	var w plainjson.Writer
	w.Begin("", '{')
	w.Text("a", `{[,:]}`)
	w.Begin("b", '[')
	w.Uint("", 1)
	w.Begin("", '{')
	w.End('}')
	w.Begin("", '[')
	w.End(']')
	w.Begin("", '{')
	w.Text("c", "c")
	w.Raw("d", []byte(`{"e":[null,"\\\"",[1]],"f":-1.5}`))
	w.End('}')
	w.End(']')
	w.End('}')
	b, _ := w.Bytes()
	for _, in := range [][]byte{b, []byte(`{}`), []byte(`[]`)} {
		var want bytes.Buffer
		if err := json.Indent(&want, in, "", "    "); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want.String(), string(plainjson.Indent(in, "    "))); d != "" {
			t.Errorf("%s (-want +got):\n%s", in, d)
		}
	}
}

func TestWriter(t *testing.T) {
	write := func(text, raw string) (string, bool) {
		var w plainjson.Writer
		w.Begin("", '{')
		w.Text("text", text)
		w.Begin("list", '[')
		w.Text("", text)
		w.Uint("", 1<<63)
		w.Begin("", '[')
		w.End(']')
		w.Begin("", '{')
		w.End('}')
		w.End(']')
		w.Raw("raw", []byte(raw))
		w.End('}')
		b, ok := w.Bytes()
		return string(b), ok
	}
	got, ok := write("a{b", ` { "x" : [ 1 ] } `)
	if want := `{"text":"a{b","list":["a{b",9223372036854775808,[],{}],"raw":{"x":[1]}}`; !ok || got != want {
		t.Errorf("wrote %s, %v; want %s", got, ok, want)
	}
	for _, text := range strings.Split("\x00,\n,\",\\,<,>,&,\x7f,ä,\xff", ",") {
		if _, ok := write(text, "1"); ok {
			t.Errorf("%q is plain", text)
		}
	}
	if _, ok := write("a", "{"); ok {
		t.Error("half an object is plain")
	}
}
