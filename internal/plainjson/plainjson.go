// Package plainjson reads and writes the plain kind of JSON that programs write for one another: texts of printable ASCII
// without escapes, whole numbers, names spelt as they should be. It is for a process that lives for milliseconds: encoding/json
// looks at every type it meets by reflection first, which takes a quarter of a millisecond the first time. And it is for requests of which a
// server gets thousands a second.
//
// It never decides what is right. Whatever is not plain it leaves alone and says so; the caller then asks encoding/json,
// and a fuzz target of the caller's holds that both agree where this package answers.
package plainjson

import (
	"bytes"
	"encoding/json"
	"strconv"
)

// Each calls fn for the members of the object b, in order, with the name and the text of the value, and reports whether b is a
// valid JSON object all of whose names are plain and fn returned true for each.
func Each(b []byte, fn func(name string, value []byte) bool) bool {
	if !valid(b) {
		return false
	}
	b = space(b) // from here on there is no need to look whether something is there
	if b[0] != '{' {
		return false
	}
	b = space(b[1:])
	for b[0] != '}' {
		n := length(b)
		name, ok := Text(b[:n])
		if !ok {
			return false
		}
		b = space(b[n:])
		b = space(b[1:]) // the colon
		n = length(b)
		if !fn(name, b[:n:n]) {
			return false
		}
		b = space(b[n:])
		if b[0] == ',' {
			b = space(b[1:])
		}
	}
	return true
}

// Elements calls fn for the text of each element of the array b, in order, and reports whether b is a valid JSON array and fn returned true for each.
func Elements(b []byte, fn func(value []byte) bool) bool {
	if !valid(b) {
		return false
	}
	b = space(b)
	if b[0] != '[' {
		return false
	}
	b = space(b[1:])
	for b[0] != ']' {
		n := length(b)
		if !fn(b[:n:n]) {
			return false
		}
		b = space(b[n:])
		if b[0] == ',' {
			b = space(b[1:])
		}
	}
	return true
}

// space returns b from its first byte that is no white space.
func space(b []byte) []byte {
	for i, c := range b {
		if c > ' ' {
			return b[i:]
		}
	}
	return nil
}

// length returns how many bytes the value at the beginning of b has.
func length(b []byte) int {
	depth := 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		case '{', '[':
			depth++
			continue
		case '}', ']':
			if depth--; depth < 0 {
				return i
			}
		case ',', ':', ' ', '\t', '\n', '\r':
			if depth == 0 {
				return i
			}
			continue
		default:
			continue
		}
		if depth == 0 {
			return i + 1
		}
	}
	return len(b)
}

// Text returns what a value stands for that is a plain text.
func Text(value []byte) (text string, ok bool) {
	n := len(value)
	if n < 2 || value[0] != '"' {
		return "", false
	}
	value = value[1 : n-1]
	for _, c := range value {
		if c < ' ' || c > '~' || c == '\\' {
			return "", false
		}
	}
	return string(value), true
}

// Int returns what a value stands for that is a whole number.
func Int(value []byte) (n int, ok bool) {
	n, err := strconv.Atoi(string(value))
	return n, err == nil
}

// Writer makes compact JSON. The zero Writer is empty and ready. Members and elements follow one another in the order of the
// calls; elements of arrays have the name "".
type Writer struct {
	buf []byte
	odd bool
}

// Bytes returns what was written, and whether all of it was plain.
func (w *Writer) Bytes() (b []byte, ok bool) { return w.buf, !w.odd }

// Begin opens an object ('{') or an array ('[').
func (w *Writer) Begin(name string, bracket byte) {
	w.name(name)
	w.buf = append(w.buf, bracket)
}

// End closes it ('}' or ']').
func (w *Writer) End(bracket byte) { w.buf = append(w.buf, bracket) }

// Text writes a text. Characters that encoding/json escapes in one of its modes are not plain.
func (w *Writer) Text(name, text string) {
	w.name(name)
	w.text(text)
}

// Uint writes a whole number.
func (w *Writer) Uint(name string, n uint64) {
	w.name(name)
	w.buf = strconv.AppendUint(w.buf, n, 10)
}

// True writes true.
func (w *Writer) True(name string) {
	w.name(name)
	w.buf = append(w.buf, "true"...)
}

// Raw writes a value that is JSON already, without its white space.
func (w *Writer) Raw(name string, value []byte) {
	w.name(name)
	b := bytes.NewBuffer(w.buf)
	w.odd = json.Compact(b, value) != nil || w.odd
	w.buf = b.Bytes()
}

// name writes what comes before a value.
func (w *Writer) name(name string) {
	if n := len(w.buf); n > 0 && w.buf[n-1] != '{' && w.buf[n-1] != '[' {
		w.buf = append(w.buf, ',')
	}
	if name != "" {
		w.text(name)
		w.buf = append(w.buf, ':')
	}
}

func (w *Writer) text(s string) {
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ' || c > '~', c == '"', c == '\\', c == '<', c == '>', c == '&':
			w.odd = true
		}
	}
	w.buf = append(w.buf, '"')
	w.buf = append(w.buf, s...)
	w.buf = append(w.buf, '"')
}
