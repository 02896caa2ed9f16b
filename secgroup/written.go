package secgroup

import (
	"cmp"
	"encoding/json"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy"
)

// ccRule is a rule as Cloud Controller has it. The order of the keys is that of the deployed server's answers.
type ccRule struct {
	Protocol    string `json:"protocol"`
	Destination string `json:"destination"`
	Ports       string `json:"ports"`
	Type        *int64 `json:"type,omitempty"`
	Code        *int64 `json:"code,omitempty"`
	Description string `json:"description"`
	Log         bool   `json:"log"`
}

func readCloudController(text []byte, strict bool) (Rule, error) {
	var w ccRule
	if err := unmarshal(text, &w, strict); err != nil {
		return Rule{}, err
	}
	protocol, err := ParseProtocol(w.Protocol)
	if err != nil {
		return Rule{}, err
	}
	r := Rule{Protocol: protocol, Log: w.Log, Description: w.Description}
	if r.Destinations, err = parseDestinations(strings.Split(w.Destination, ","), strict); err != nil {
		return Rule{}, err
	}
	var ports []policy.Ports
	if strings.TrimSpace(w.Ports) != "" { // spaces between them always were allowed
		if ports, err = parsePorts(strings.Split(w.Ports, ","), false); err != nil {
			return Rule{}, err
		}
	}
	return r, r.check(ports, w.Type, w.Code, strict)
}

// Format writes rules in the form of Cloud Controller, all seven keys in each, so that deployed agents can read them too. Every type or code is -1.
func Format(rules []Rule) string {
	list := make([]ccRule, len(rules))
	for i, r := range rules {
		typ, code := int64(r.Type), int64(r.Code)
		list[i] = ccRule{Protocol: r.Protocol.String(), Type: &typ, Code: &code, Description: r.Description, Log: r.Log}
		list[i].Destination, list[i].Ports = joined(r.Destinations, ","), joined(r.Ports, ",")
	}
	return encode(list)
}

// Normalize returns rules in the form of Cloud Controller with what is known of each: the seven keys that deployed agents expect, without
// others. Rules that Read would leave out are kept as they are written, so that whoever reads them sees them; but what is no rule at all,
// which would make those agents refuse the whole list, is left out and told. Zeroes stand for a type or code that is not written, though
// not in rules for icmp, where 0 means something. An error, fault.Invalid, says that this is no list.
func Normalize(text []byte) (string, []Problem, error) {
	var list []json.RawMessage
	if err := unmarshal(text, &list, false); err != nil {
		return "", nil, fault.Invalidf("rules are no JSON array of objects: %w", err)
	}
	kept, zero := make([]ccRule, 0, len(list)), int64(0)
	var problems []Problem
	for i, text := range list {
		var r ccRule
		err := unmarshal(text, &r, false)
		if string(text) == "null" {
			err = fault.Invalidf("null is no rule: expected an object")
		}
		if err != nil {
			problems = append(problems, Problem{i + 1, err})
			continue
		}
		if r.Protocol != ICMP.String() {
			r.Type, r.Code = cmp.Or(r.Type, &zero), cmp.Or(r.Code, &zero)
		}
		kept = append(kept, r)
	}
	return encode(kept), problems, nil
}

// encode writes JSON without the escapes of HTML, which only make texts longer.
func encode(v any) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(v) // strings and numbers
	return strings.TrimSuffix(b.String(), "\n")
}

func joined[T interface{ String() string }](list []T, by string) string {
	var b strings.Builder
	for i, e := range list {
		if i > 0 {
			b.WriteString(by)
		}
		b.WriteString(e.String())
	}
	return b.String()
}

// gardenRule is one of Garden's netOutRules.
type gardenRule struct {
	Protocol uint8 `json:"protocol"`
	Networks []struct {
		Start string `json:"start"`
		End   string `json:"end"`
	} `json:"networks"`
	Ports []struct {
		Start int64 `json:"start"`
		End   int64 `json:"end"`
	} `json:"ports"`
	ICMPs *struct {
		Type *int64 `json:"type"`
		Code *int64 `json:"code"`
	} `json:"icmps"`
	Log bool `json:"log"`
}

// gardenProtocols are the numbers that Garden gives them.
var gardenProtocols = []Protocol{All, TCP, UDP, ICMP}

func readGarden(text []byte, strict bool) (Rule, error) {
	var w gardenRule
	if err := unmarshal(text, &w, strict); err != nil {
		return Rule{}, err
	}
	if int(w.Protocol) >= len(gardenProtocols) {
		return Rule{}, fault.Invalidf("protocol %d: expected 0 for all, 1 tcp, 2 udp or 3 icmp", w.Protocol)
	}
	r := Rule{Protocol: gardenProtocols[w.Protocol], Log: w.Log}
	if len(w.Networks) == 0 {
		return Rule{}, fault.Invalidf("networks are missing: expected at least one, 0.0.0.0 to 255.255.255.255 for everywhere")
	}
	for _, n := range w.Networks {
		d, err := parseBounds(n.Start, n.End)
		if err != nil {
			return Rule{}, err
		}
		r.Destinations = append(r.Destinations, d)
	}
	var ports []policy.Ports
	for _, p := range w.Ports {
		if p.Start < 1 || p.End < p.Start || p.End > 65535 {
			return Rule{}, fault.Invalidf("ports from %d to %d: expected start <= end, within 1-65535", p.Start, p.End)
		}
		ports = append(ports, policy.Ports{First: uint16(p.Start), Last: uint16(p.End)})
	}
	var typ, code *int64
	if w.ICMPs != nil {
		if typ, code = w.ICMPs.Type, w.ICMPs.Code; code == nil {
			code = new(int64)
			*code = Any
		}
	}
	return r, r.check(ports, typ, code, strict)
}

// ownRule is a rule as Silk's own API has it.
type ownRule struct {
	Protocol     string   `json:"protocol"`
	Destinations []string `json:"destinations"`
	Ports        []string `json:"ports,omitempty"`
	Type         *int64   `json:"type,omitempty"`
	Code         *int64   `json:"code,omitempty"`
	Description  string   `json:"description,omitempty"`
	Log          bool     `json:"log,omitempty"`
}

func readOwn(text []byte, strict bool) (Rule, error) {
	var w ownRule
	if err := unmarshal(text, &w, strict); err != nil {
		return Rule{}, err
	}
	protocol, err := ParseProtocol(w.Protocol)
	if err != nil {
		return Rule{}, err
	}
	r := Rule{Protocol: protocol, Log: w.Log, Description: w.Description}
	if r.Destinations, err = parseDestinations(w.Destinations, strict); err != nil {
		return Rule{}, err
	}
	ports, err := parsePorts(w.Ports, strict)
	if err != nil {
		return Rule{}, err
	}
	if protocol == ICMP {
		all := int64(Any)
		if w.Type == nil {
			w.Type = &all
		}
		if w.Code == nil {
			w.Code = &all
		}
	}
	return r, r.check(ports, w.Type, w.Code, strict)
}

// MarshalJSON writes the rule in Silk's own form.
func (r Rule) MarshalJSON() ([]byte, error) {
	w := ownRule{Protocol: r.Protocol.String(), Description: r.Description, Log: r.Log}
	for _, d := range r.Destinations {
		w.Destinations = append(w.Destinations, d.String())
	}
	for _, p := range r.Ports {
		w.Ports = append(w.Ports, p.String())
	}
	if r.Protocol == ICMP && r.Type != Any {
		w.Type = new(int64)
		*w.Type = int64(r.Type)
	}
	if r.Protocol == ICMP && r.Code != Any {
		w.Code = new(int64)
		*w.Code = int64(r.Code)
	}
	return []byte(encode(w)), nil
}

// UnmarshalJSON reads a rule in Silk's own form, as strictly as Parse.
func (r *Rule) UnmarshalJSON(text []byte) error {
	v, err := Own.rule(text, true)
	if err == nil {
		*r = v
	}
	return err
}

// String returns the rule in a line: "tcp 10.0.0.0/8,10.1.0.1 443,8000-8100 log".
func (r Rule) String() string {
	s := r.Protocol.String() + " " + joined(r.Destinations, ",")
	if len(r.Ports) > 0 {
		s += " " + joined(r.Ports, ",")
	}
	if r.Protocol == ICMP && (r.Type != Any || r.Code != Any) {
		s += " type " + number(r.Type) + " code " + number(r.Code)
	}
	if r.Log {
		s += " log"
	}
	return s
}

func number(n int16) string {
	if n == Any {
		return "any"
	}
	return strconv.Itoa(int(n))
}
