// Package identity names who sends and who receives: the policy group that a container belongs to, and the tag that
// stands for the group on the wire.
//
// A group is known to people and to policy-server; a tag is given to it by policy-server, travels in the VXLAN Group
// Policy header and means nothing else. The package gives no tags (policy/policysql) and marks no packets (firewall).
package identity

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"code.cloudfoundry.org/silk/fault"
)

// MaxGroup bounds the name of a group in bytes: what the deployed tables hold.
const MaxGroup = 255

// Group is the identity that policies speak of: an app GUID in Cloud Foundry, any text of 1 to MaxGroup bytes elsewhere.
type Group string

// Validate reports, as fault.Invalid, a name that no group can have: empty, longer than MaxGroup bytes, not UTF-8, or with
// characters that do not print or separate lists (a comma).
func (g Group) Validate() error {
	switch {
	case g == "":
		return fault.Invalidf("policy group is empty: expected a name such as an app GUID")
	case len(g) > MaxGroup:
		return fault.Invalidf("policy group %.40q... has %d bytes: expected at most %d", string(g), len(g), MaxGroup)
	case !utf8.ValidString(string(g)) || strings.ContainsFunc(string(g), func(r rune) bool { return r == ',' || r != ' ' && !unicode.IsGraphic(r) }):
		return fault.Invalidf("policy group %q: expected printable characters without commas", string(g))
	}
	return nil
}

// Tag stands for a group in the 16 bits of the VXLAN Group Policy header (draft-smith-vxlan-group-policy-05, section 2.1). 0 is no tag.
type Tag uint16

// MaxTag is the highest tag that the header can carry.
const MaxTag Tag = 1<<16 - 1

// MaxTagOf returns the highest tag that fits in length bytes (1 or more) and in the header.
func MaxTagOf(length int) Tag {
	if length == 1 {
		return 1<<8 - 1
	}
	return MaxTag
}

// Text returns the tag as policy-server writes it: upper-case hexadecimal of at least 2*length digits.
func (t Tag) Text(length int) string { return fmt.Sprintf("%0*X", 2*length, uint16(t)) }

// String is Text with the deployed length of 2 bytes.
func (t Tag) String() string { return t.Text(2) }

// ParseTag reads what Text writes, in either case and of any width up to 8 digits. What does not fit in 16 bits, or is no tag (0), is fault.Invalid.
func ParseTag(s string) (Tag, error) {
	n, err := strconv.ParseUint(s, 16, 16)
	if err != nil || n == 0 || len(s) > 8 {
		return 0, fault.Invalidf("tag %.20q: expected hexadecimal digits, 0001 to FFFF", s)
	}
	return Tag(n), nil
}

// MarshalText returns String, "" for no tag.
func (t Tag) MarshalText() ([]byte, error) {
	if t == 0 {
		return nil, nil
	}
	return []byte(t.String()), nil
}

// UnmarshalText is ParseTag; nothing is no tag.
func (t *Tag) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*t = 0
		return nil
	}
	v, err := ParseTag(string(b))
	if err == nil {
		*t = v
	}
	return err
}

// The kinds of group: whose tags they are.
const (
	App    = "app"    // of a policy's source or destination
	Router = "router" // of overlay ingress
)

// IngressRouter is the group of overlay ingress; policies do not speak of it.
const IngressRouter Group = "INGRESS_ROUTER"

// Tagged is a group with its tag.
type Tagged struct {
	Group Group
	Tag   Tag
	Kind  string // App, Router, or what an internal client chose, at most MaxGroup bytes
}
