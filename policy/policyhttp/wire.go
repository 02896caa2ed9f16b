package policyhttp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"unicode/utf8"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// version is one of the two shapes of the external API.
type version string

const (
	v0 version = "v0" // destination.port
	v1 version = "v1" // destination.ports
)

// wireSource and wireItem are a policy as it is sent; v0 has Port, v1 has Ports. Members that are missing are empty.
type wireSource struct {
	ID  string `json:"id"`
	Tag string `json:"tag"`
}

type wirePorts struct {
	Start int `json:"start"`
	End   int `json:"end"`
}

type wireItem struct {
	Source      wireSource `json:"source"`
	Destination struct {
		ID       string    `json:"id"`
		Tag      string    `json:"tag"`
		Protocol string    `json:"protocol"`
		Port     int       `json:"port"`
		Ports    wirePorts `json:"ports"`
	} `json:"destination"`
}

// decodePolicies reads the body of a create or delete. The deployed server reads all of it before it judges the first policy, so
// what is no JSON wins over what is no policy; of these the first one counts.
func decodePolicies(body []byte, v version) ([]policy.Policy, error) {
	if ps, ok := plainPolicies(body, v); ok {
		return ps, nil
	}
	return decodeAny(body, v)
}

// decodeAny is decodePolicies by encoding/json.
func decodeAny(body []byte, v version) ([]policy.Policy, error) {
	in := struct {
		Policies wireItems `json:"policies"`
	}{wireItems{version: v, wrong: errMissing}}
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, fmt.Errorf("mapper: unmarshal json: %w", err)
	}
	if in.Policies.wrong != nil {
		return nil, fmt.Errorf("mapper: validate policies: %w", in.Policies.wrong)
	}
	return in.Policies.good, nil
}

var errMissing = errors.New("missing policies")

// wireItems is a list of policies that is judged as it is read: as text or as items, millions of which fit in a body, it would take many times the body's memory.
type wireItems struct {
	version version
	good    []policy.Policy // up to the first that is wrong
	wrong   error
}

// UnmarshalJSON implements json.Unmarshaler.
func (l *wireItems) UnmarshalJSON(b []byte) error {
	l.good, l.wrong = nil, errMissing
	if b[0] != '[' {
		return json.Unmarshal(b, new([]struct{}))
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if _, err := d.Token(); err != nil {
		return err
	}
	var item wireItem
	for first := true; d.More(); first = false {
		item = wireItem{}
		if err := d.Decode(&item); err != nil {
			return err
		}
		if first {
			l.wrong = nil
		}
		if l.wrong != nil {
			continue
		}
		p, err := item.judge(l.version)
		if l.wrong = err; err == nil {
			l.good = append(l.good, p)
		}
	}
	return nil
}

// judge returns the policy that the item spells, or in the deployed server's words and order why it is none.
func (w *wireItem) judge(v version) (policy.Policy, error) {
	d := &w.Destination
	protocol, err := policy.ParseProtocol(d.Protocol)
	switch {
	case w.Source.ID == "":
		return policy.Policy{}, errors.New("missing source id")
	case d.ID == "":
		return policy.Policy{}, errors.New("missing destination id")
	case err != nil:
		return policy.Policy{}, errors.New("invalid destination protocol, specify either udp or tcp")
	}
	if v == v0 {
		err = judgePort(d.Port)
		d.Ports = wirePorts{d.Port, d.Port}
	} else {
		err = judgePorts(d.Ports)
	}
	if err != nil {
		return policy.Policy{}, err
	}
	if w.Source.Tag != "" || d.Tag != "" {
		return policy.Policy{}, errors.New("tags may not be specified")
	}
	p := policy.Policy{
		Source: identity.Group(w.Source.ID), Destination: identity.Group(d.ID), Protocol: protocol,
		Ports: policy.Ports{First: uint16(d.Ports.Start), Last: uint16(d.Ports.End)},
	}
	return p, p.Validate() // which the deployed server does not: names that are too long or do not print
}

func judgePort(port int) error {
	switch {
	case port < 0 || port > math.MaxUint16: // which the deployed server accepts in v0
		return fmt.Errorf("invalid port %d, must be in range 1-65535", port)
	case port == 0:
		return errors.New("missing port")
	}
	return nil
}

func judgePorts(p wirePorts) error {
	switch {
	case p.Start > p.End:
		return fmt.Errorf("invalid port range %d-%d, start must be less than or equal to end", p.Start, p.End)
	case p.Start < 0:
		return fmt.Errorf("invalid start port %d, must be in range 1-65535", p.Start)
	case p.Start == 0:
		return errors.New("missing start port")
	case p.End > math.MaxUint16:
		return fmt.Errorf("invalid end port %d, must be in range 1-65535", p.End)
	}
	return nil
}

// shape is what of a rule is written.
type shape struct {
	version version
	tags    int // length of tags in bytes; 0: none
}

// shows reports whether the shape can express a rule: v0 has no ranges, and hides them.
func (s shape) shows(r *policy.Rule) bool { return s.version == v1 || r.Ports.Single() }

// ruleSize is about what one rule takes as JSON between two GUIDs.
const ruleSize = 192

// appendRule writes a rule.
func (s shape) appendRule(b []byte, r *policy.Rule) []byte {
	b = append(b, `{"source":{"id":`...)
	b = appendString(b, string(r.Source))
	b = s.appendTag(b, r.SourceTag)
	b = append(b, `},"destination":{"id":`...)
	b = appendString(b, string(r.Destination))
	b = s.appendTag(b, r.DestinationTag)
	b = append(b, `,"protocol":"`...)
	b = append(b, r.Protocol.String()...)
	if s.version == v0 {
		b = append(b, `","port":`...)
		b = strconv.AppendUint(b, uint64(r.Ports.First), 10)
		return append(b, "}}"...)
	}
	b = append(b, `","ports":{"start":`...)
	b = strconv.AppendUint(b, uint64(r.Ports.First), 10)
	b = append(b, `,"end":`...)
	b = strconv.AppendUint(b, uint64(r.Ports.Last), 10)
	return append(b, "}}}"...)
}

func (s shape) appendTag(b []byte, t identity.Tag) []byte {
	if s.tags == 0 {
		return b
	}
	b = append(b, `,"tag":"`...)
	b = appendTag(b, t, s.tags)
	return append(b, '"')
}

// appendTag is Tag.Text without its memory.
func appendTag(b []byte, t identity.Tag, length int) []byte {
	const digits = "0123456789ABCDEF"
	for n := max(2*length, 4) - 1; n >= 0; n-- {
		d := 0
		if n < 4 {
			d = int(t) >> (4 * n) & 15
		}
		if n < 2*length || int(t)>>(4*n) > 0 {
			b = append(b, digits[d])
		}
	}
	return b
}

// appendString writes s as encoding/json does.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' || c >= utf8.RuneSelf {
			q, err := json.Marshal(s)
			if err != nil { // cannot be: every string can be written
				q = []byte(`""`)
			}
			return append(b, q...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}
