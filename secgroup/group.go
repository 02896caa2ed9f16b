package secgroup

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
)

// The bounds of what names a security group, in bytes: what the deployed tables hold.
const (
	MaxGUID  = 36
	MaxName  = 255
	MaxSpace = 255
)

// Group is a security group: rules, and whose containers have them. The order of a list of groups means something: see Select.
type Group struct {
	GUID, Name string // GUID is the identity: 1 to MaxGUID bytes; Name is for people

	Rules []Rule // in the order in which they are written

	StagingDefault, RunningDefault bool     // for all containers that stage, or run, an app or a task
	StagingSpaces, RunningSpaces   []string // for those of these spaces
	Members                        []identity.Group
}

// Record is a group as stores and servers pass it on: its rules are text in the form of Cloud Controller, and what cannot be understood of them is
// still there.
type Record struct {
	GUID, Name                     string
	Rules                          string
	StagingDefault, RunningDefault bool
	StagingSpaces, RunningSpaces   []string
	Members                        []identity.Group
}

// Record returns the group as it is stored.
func (g Group) Record() Record {
	return Record{g.GUID, g.Name, Format(g.Rules), g.StagingDefault, g.RunningDefault, g.StagingSpaces, g.RunningSpaces, g.Members}
}

// Group reads the rules for enforcement, with a problem for each that is left out; see Form.Read.
func (r Record) Group() (Group, []Problem) {
	rules, problems := CloudController.Read([]byte(r.Rules))
	return Group{r.GUID, r.Name, rules, r.StagingDefault, r.RunningDefault, r.StagingSpaces, r.RunningSpaces, r.Members}, problems
}

// Equal reports whether two records say the same, the orders of spaces and members included.
func (r Record) Equal(o Record) bool {
	return r.GUID == o.GUID && r.Name == o.Name && r.Rules == o.Rules && r.StagingDefault == o.StagingDefault && r.RunningDefault == o.RunningDefault &&
		slices.Equal(r.StagingSpaces, o.StagingSpaces) && slices.Equal(r.RunningSpaces, o.RunningSpaces) && slices.Equal(r.Members, o.Members)
}

// Touches reports whether a container of one of the spaces or of one of the policy groups has the security group, or every container has.
func (r Record) Touches(spaces []string, members []identity.Group) bool {
	return r.StagingDefault || r.RunningDefault || share(r.StagingSpaces, spaces) || share(r.RunningSpaces, spaces) || share(r.Members, members)
}

func share[T comparable](a, b []T) bool {
	return slices.ContainsFunc(a, func(e T) bool { return slices.Contains(b, e) })
}

// Validate reports, as fault.Invalid, what no store can keep: a GUID, a name, a space or a member that is none. It does not look at the rules.
func (r Record) Validate() error {
	if err := printable("guid", r.GUID, MaxGUID); err != nil {
		return err
	}
	if strings.Contains(r.GUID, "/") || r.GUID == "." || r.GUID == ".." {
		return fault.Invalidf("guid %q: expected no slash, since it is a part of paths", r.GUID)
	}
	if err := printable("name", r.Name, MaxName); err != nil {
		return err
	}
	for _, spaces := range [][]string{r.StagingSpaces, r.RunningSpaces} {
		for _, s := range spaces {
			if err := printable("space", s, MaxSpace); err != nil {
				return err
			}
			if strings.Contains(s, ",") {
				return fault.Invalidf("space %.60q: expected no comma, since it separates spaces", s)
			}
		}
	}
	for _, m := range r.Members {
		if err := m.Validate(); err != nil {
			return err
		}
	}
	return nil
}

func printable(what, s string, limit int) error {
	switch {
	case s == "":
		return fault.Invalidf("%s is empty", what)
	case len(s) > limit:
		return fault.Invalidf("%s %.40q... has %d bytes: expected at most %d", what, s, len(s), limit)
	case !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r != ' ' && !unicode.IsGraphic(r) }):
		return fault.Invalidf("%s %.60q: expected printable characters", what, s)
	}
	return nil
}

// Digest proves that a list of records is complete and in order. It finds what was lost or damaged by mistake, not what was forged.
type Digest uint64

// String returns 16 hexadecimal digits.
func (d Digest) String() string { return fmt.Sprintf("%016x", uint64(d)) }

// Sum returns the digest of a list.
func Sum(list []Record) Digest {
	d := Digest(basis)
	for _, r := range list {
		d = d.Add(r.Digest())
	}
	return d
}

// Add returns the digest of the list with one record more, of the given digest.
func (d Digest) Add(record Digest) Digest {
	h := digest(d)
	h.number(int(record >> 32))
	h.number(int(record & 0xffffffff))
	return Digest(h)
}

// ParseDigest reads what String writes. Anything else is fault.Invalid.
func ParseDigest(s string) (Digest, error) {
	n, err := strconv.ParseUint(s, 16, 64)
	if err != nil || len(s) != 16 {
		return 0, fault.Invalidf("digest %.40q: expected 16 hexadecimal digits", s)
	}
	return Digest(n), nil
}

// MarshalText returns String.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText is ParseDigest.
func (d *Digest) UnmarshalText(b []byte) error {
	v, err := ParseDigest(string(b))
	if err == nil {
		*d = v
	}
	return err
}

// Digest returns the record's own: FNV-1a of all fields, each with its length.
func (r Record) Digest() Digest {
	h := digest(basis)
	h.text(r.GUID)
	h.text(r.Name)
	h.text(r.Rules)
	flags := 0
	if r.StagingDefault {
		flags |= 1
	}
	if r.RunningDefault {
		flags |= 2
	}
	h.number(flags)
	texts(&h, r.StagingSpaces)
	texts(&h, r.RunningSpaces)
	texts(&h, r.Members)
	return Digest(h)
}

const basis = 14695981039346656037

type digest uint64

func (d *digest) text(s string) {
	d.number(len(s))
	h := *d
	for i := range len(s) {
		h = (h ^ digest(s[i])) * 1099511628211
	}
	*d = h
}

func (d *digest) number(n int) {
	for range 4 {
		*d = (*d ^ digest(n&0xff)) * 1099511628211
		n >>= 8
	}
}

func texts[T ~string](d *digest, list []T) {
	d.number(len(list))
	for _, s := range list {
		d.text(string(s))
	}
}
