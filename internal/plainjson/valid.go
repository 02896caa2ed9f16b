package plainjson

import "bytes"

// maxDepth bounds how deep a plain value is nested.
const maxDepth = 64

// valid reports whether b is one JSON value, with white space around it, that is not nested too deeply. encoding/json has the same
// function; the memory that it touches when it is called for the first time is what an ADD can do without.
func valid(b []byte) bool {
	rest, ok := value(b, maxDepth)
	return ok && len(blank(rest)) == 0
}

// value returns what follows the value at the beginning of b.
func value(b []byte, depth int) (rest []byte, ok bool) {
	b = blank(b)
	if len(b) == 0 {
		return nil, false
	}
	switch c := b[0]; {
	case c == '"':
		return quoted(b)
	case c == '{' && depth > 0:
		return members(b[1:], depth-1)
	case c == '[' && depth > 0:
		return elements(b[1:], depth-1)
	case c == '-' || '0' <= c && c <= '9':
		return numeral(b)
	}
	for _, word := range []string{"true", "false", "null"} {
		if len(b) >= len(word) && string(b[:len(word)]) == word {
			return b[len(word):], true
		}
	}
	return nil, false
}

// blank returns b from its first byte that is no white space of JSON.
func blank(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t' || b[0] == '\n' || b[0] == '\r') {
		b = b[1:]
	}
	return b
}

// members returns what follows an object whose brace has been read.
func members(b []byte, depth int) (rest []byte, ok bool) {
	if b = blank(b); bytes.HasPrefix(b, []byte("}")) {
		return b[1:], true
	}
	for {
		if b, ok = quoted(blank(b)); !ok {
			return nil, false
		}
		if b = blank(b); len(b) == 0 || b[0] != ':' {
			return nil, false
		}
		if b, ok = value(b[1:], depth); !ok {
			return nil, false
		}
		if b = blank(b); len(b) == 0 || b[0] != ',' {
			return closing(b, '}')
		}
		b = b[1:]
	}
}

// elements returns what follows an array whose bracket has been read.
func elements(b []byte, depth int) (rest []byte, ok bool) {
	if b = blank(b); bytes.HasPrefix(b, []byte("]")) {
		return b[1:], true
	}
	for {
		if b, ok = value(b, depth); !ok {
			return nil, false
		}
		if b = blank(b); len(b) == 0 || b[0] != ',' {
			return closing(b, ']')
		}
		b = b[1:]
	}
}

func closing(b []byte, bracket byte) (rest []byte, ok bool) {
	if len(b) == 0 || b[0] != bracket {
		return nil, false
	}
	return b[1:], true
}

// quoted returns what follows the text at the beginning of b.
func quoted(b []byte) (rest []byte, ok bool) {
	if len(b) == 0 || b[0] != '"' {
		return nil, false
	}
	for i := 1; i < len(b); i++ {
		switch c := b[i]; {
		case c == '"':
			return b[i+1:], true
		case c < ' ':
			return nil, false
		case c == '\\':
			i++
			if i == len(b) {
				return nil, false
			}
			if b[i] == 'u' {
				if len(b) < i+5 || !hexadecimal(b[i+1:i+5]) {
					return nil, false
				}
				i += 4
			} else if bytes.IndexByte([]byte(`"\/bfnrt`), b[i]) < 0 {
				return nil, false
			}
		}
	}
	return nil, false
}

func hexadecimal(b []byte) bool {
	for _, c := range b {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F') {
			return false
		}
	}
	return true
}

// numeral returns what follows the number at the beginning of b.
func numeral(b []byte) (rest []byte, ok bool) {
	if b[0] == '-' {
		b = b[1:]
	}
	if len(b) > 0 && b[0] == '0' {
		b = b[1:]
	} else if b, ok = digits(b); !ok {
		return nil, false
	}
	if len(b) > 0 && b[0] == '.' {
		if b, ok = digits(b[1:]); !ok {
			return nil, false
		}
	}
	if len(b) > 0 && (b[0] == 'e' || b[0] == 'E') {
		if b = b[1:]; len(b) > 0 && (b[0] == '+' || b[0] == '-') {
			b = b[1:]
		}
		return digits(b)
	}
	return b, true
}

// digits returns what follows one or more digits.
func digits(b []byte) (rest []byte, ok bool) {
	n := 0
	for n < len(b) && '0' <= b[n] && b[n] <= '9' {
		n++
	}
	return b[n:], n > 0
}

// Indent returns what a Writer wrote with every element and member on a line of its own, as json.Indent has it.
func Indent(b []byte, indent string) []byte {
	out := make([]byte, 0, 2*len(b)+64)
	depth := 0
	line := func() {
		out = append(out, '\n')
		for range depth {
			out = append(out, indent...)
		}
	}
	for i := 0; i < len(b); i++ {
		switch c := b[i]; c {
		case '"':
			n := length(b[i:])
			out = append(out, b[i:i+n]...)
			i += n - 1
		case '{', '[':
			out = append(out, c)
			if b[i+1] == c+2 { // '}' and ']' come two after
				out = append(out, b[i+1])
				i++
				continue
			}
			depth++
			line()
		case '}', ']':
			depth--
			line()
			out = append(out, c)
		case ',':
			out = append(out, c)
			line()
		case ':':
			out = append(out, ':', ' ')
		default:
			out = append(out, c)
		}
	}
	return out
}
