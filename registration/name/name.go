// Package name has domain names in one form, so that equal names are equal texts.
//
// It is apart from package registration for the CNI plugin, which reads names and would otherwise start with all that keeping them takes.
package name

import (
	"strings"

	"code.cloudfoundry.org/silk/fault"
)

// Max bounds a name in bytes, without the final dot (RFC 1035 section 2.3.4).
const Max = 253

// maxLabel bounds a part of a name in bytes.
const maxLabel = 63

// Name is a domain name in its one form: lower case, no final dot, labels of 1 to 63 letters, digits, hyphens and underscores. The first
// label may be "*", which stands for one label or more.
type Name string

// Parse reads a name in any case, with or without the final dot. fault.Invalid says what is wrong with it.
func Parse(s string) (Name, error) {
	text := strings.TrimSuffix(s, ".")
	if text == "" || len(text) > Max {
		return "", fault.Invalidf("name %.80q has %d bytes: expected 1 to %d", s, len(text), Max)
	}
	first := true
	for label := range strings.SplitSeq(text, ".") {
		if !validLabel(label) && !(first && label == "*" && len(text) > 2) {
			return "", fault.Invalidf("name %.80q: part %.80q: expected 1 to %d letters, digits, hyphens and underscores, no hyphen at either end", s, label, maxLabel)
		}
		first = false
	}
	return Name(lower(text)), nil
}

func validLabel(s string) bool {
	if s == "" || len(s) > maxLabel || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}

// lower changes the letters of ASCII alone, as names compare (RFC 4343); strings.ToLower would change others too.
func lower(s string) string {
	for i := range len(s) {
		if s[i] >= 'A' && s[i] <= 'Z' {
			b := []byte(s)
			for ; i < len(b); i++ {
				if b[i] >= 'A' && b[i] <= 'Z' {
					b[i] += 'a' - 'A'
				}
			}
			return string(b)
		}
	}
	return s
}

// Below reports whether the name is domain or lies below it.
func (n Name) Below(domain Name) bool {
	return n == domain || len(n) > len(domain) && strings.HasSuffix(string(n), string(domain)) && n[len(n)-len(domain)-1] == '.'
}
