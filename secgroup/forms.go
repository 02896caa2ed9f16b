package secgroup

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy"
)

// Form is one of the written forms of lists of rules. All of them are JSON arrays of objects whose keys match whatever their case, as
// the deployed programs read them.
type Form uint8

// The forms.
const (
	// Own is Silk's: {"protocol":"tcp","destinations":["10.0.0.0/8","10.1.0.1-10.1.0.9"],"ports":["443","8000-8100"]}, and for icmp "type" and
	// "code", which allow every one when they are left out.
	Own Form = iota

	// CloudController is that of Cloud Controller and of policy-server's tables and internal API:
	// {"protocol":"tcp","destination":"10.0.0.0/8,10.1.0.1","ports":"443,8000-8100"}, and for icmp "type" and "code", which allow every one when they
	// are -1 (or 255, what -1 becomes in eight bits).
	CloudController

	// Garden is that of netOutRules: {"protocol":1,"networks":[{"start":"10.0.0.0","end":"10.255.255.255"}],"ports":[{"start":443,"end":443}]}, where
	// protocol is 0 for all, 1 tcp, 2 udp, 3 icmp, and for icmp {"icmps":{"type":8,"code":0}}; 255 is every one, and so is a code that is left out.
	Garden
)

// String returns the name of the form.
func (f Form) String() string {
	switch f {
	case Own:
		return "silk"
	case CloudController:
		return "cloud controller"
	case Garden:
		return "garden"
	}
	return fmt.Sprintf("form %d", uint8(f))
}

// Problem is why a rule of a list was left out.
type Problem struct {
	Rule int   // its place in the list, from 1; 0: the list itself cannot be read, and nothing of it is known
	Err  error // fault.Invalid
}

// String returns "rule 3: " and the reason.
func (p Problem) String() string {
	if p.Rule == 0 {
		return p.Err.Error()
	}
	return fmt.Sprintf("rule %d: %v", p.Rule, p.Err)
}

// maxProblems bounds how many reasons an error holds.
const maxProblems = 20

// Parse reads a list for keeping. What could be misread, by anybody who reads it later, is refused: all reasons (of the first 20 rules that have
// one) are in the error, which is fault.Invalid, each with what to write instead.
func (f Form) Parse(text []byte) ([]Rule, error) {
	rules, problems := f.read(text, true)
	if len(problems) == 0 {
		return rules, nil
	}
	errs := make([]error, 0, len(problems))
	for i, p := range problems {
		if i == maxProblems {
			errs = append(errs, fault.Invalidf("and %d more", len(problems)-i))
			break
		}
		errs = append(errs, fault.New(fault.Invalid, errors.New(p.String())))
	}
	return nil, errors.Join(errs...)
}

// Read reads a list for enforcement: the rules whose meaning is certain, in order, and a problem for each other one. Such a rule is left
// out whole, so what is read never allows more than what is written. Everything that Parse takes, Read takes for the same; beyond that it
// takes spaces in lists, networks whose address has bits beyond the prefix (they stand for the network, as in the deployed agent), keys
// that it does not know, and types of icmp or none in rules of other protocols, which mean nothing.
func (f Form) Read(text []byte) ([]Rule, []Problem) { return f.read(text, false) }

func (f Form) read(text []byte, strict bool) ([]Rule, []Problem) {
	var list []json.RawMessage
	if err := unmarshal(text, &list, false); err != nil {
		return nil, []Problem{{0, fault.Invalidf("rules are no JSON array of objects: %w", err)}}
	}
	if list == nil && f != Garden { // which writes null for no rules
		return nil, []Problem{{0, fault.Invalidf("rules are null: expected an array, [] for none")}}
	}
	rules := make([]Rule, 0, len(list))
	var problems []Problem
	for i, text := range list {
		r, err := f.rule(text, strict)
		if err != nil {
			problems = append(problems, Problem{i + 1, err})
			continue
		}
		rules = append(rules, r)
	}
	return rules, problems
}

func (f Form) rule(text []byte, strict bool) (Rule, error) {
	if string(bytes.TrimSpace(text)) == "null" {
		return Rule{}, fault.Invalidf("null is no rule: expected an object")
	}
	switch f {
	case Own:
		return readOwn(text, strict)
	case CloudController:
		return readCloudController(text, strict)
	case Garden:
		return readGarden(text, strict)
	}
	return Rule{}, fault.Invalidf("%v is no form of rules", f)
}

// unmarshal reads one JSON value; strictly, one without keys that are not known.
func unmarshal(text []byte, into any, strict bool) error {
	d := json.NewDecoder(bytes.NewReader(text))
	if strict {
		d.DisallowUnknownFields()
	}
	if err := d.Decode(into); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("nothing is there")
		}
		return fault.New(fault.Invalid, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fault.Invalidf("something follows the value")
	}
	return nil
}

// check completes a rule of any form: what must not stand in it beside its protocol, and what must. typ and code are nil when they are not
// written; strictly, zeroes may be written where they mean nothing.
func (r *Rule) check(ports []policy.Ports, typ, code *int64, strict bool) error {
	switch r.Protocol {
	case TCP, UDP:
		if len(ports) == 0 {
			return fault.Invalidf("ports are missing: expected such as 443 or 8000-8100, 1-65535 for every one")
		}
		r.Ports = ports
	default:
		if len(ports) > 0 {
			return fault.Invalidf("ports %v in a rule for %v: only tcp and udp have ports; write a rule for each protocol", ports[0], r.Protocol)
		}
	}
	if r.Protocol == ICMP {
		var err error
		if r.Type, err = icmpNumber("type", typ); err == nil {
			r.Code, err = icmpNumber("code", code)
		}
		return err
	}
	if strict && (typ != nil && *typ != 0 || code != nil && *code != 0) {
		return fault.Invalidf("type or code in a rule for %v: only icmp has them; leave them out", r.Protocol)
	}
	return nil
}

// every is what -1 becomes in eight bits. No type of ICMP has this number: IANA reserves it.
const every = 255

func icmpNumber(what string, n *int64) (int16, error) {
	switch {
	case n == nil:
		return 0, fault.Invalidf("%s is missing in a rule for icmp: expected 0 to 254, or -1 for every one", what)
	case *n == Any || *n == every:
		return Any, nil
	case *n < 0 || *n > every:
		return 0, fault.Invalidf("icmp %s %d: expected 0 to 254, or -1 for every one", what, *n)
	}
	return int16(*n), nil
}
