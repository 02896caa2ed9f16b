package policyhttp

import (
	"encoding/json"
	"fmt"
	"strconv"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// rule returns the rule that w spells, in the shape of v1, or why it is none. Tags are left out of lists for people.
func (w wireItem) rule(tags bool) (policy.Rule, error) {
	source, destination := w.Source.Tag, w.Destination.Tag
	w.Source.Tag, w.Destination.Tag = "", ""
	p, err := w.judge(v1)
	if err != nil {
		return policy.Rule{}, err
	}
	r := policy.Rule{Policy: p}
	if !tags {
		return r, nil
	}
	if r.SourceTag, err = identity.ParseTag(source); err != nil {
		return r, fmt.Errorf("source: %w", err)
	}
	if r.DestinationTag, err = identity.ParseTag(destination); err != nil {
		return r, fmt.Errorf("destination: %w", err)
	}
	return r, nil
}

// decodeRules reads policies; those that are none are told of.
func decodeRules(raw []json.RawMessage, tags bool) (good []policy.Rule, bad []error) {
	good = make([]policy.Rule, 0, len(raw))
	for _, m := range raw {
		var w wireItem
		err := json.Unmarshal(m, &w)
		if err == nil {
			var r policy.Rule
			if r, err = w.rule(tags); err == nil {
				good = append(good, r)
				continue
			}
		}
		bad = append(bad, fmt.Errorf("policy %.300s: %v", m, err))
	}
	return good, bad
}

// partial returns what was left out as an error, nil if nothing was.
func partial(bad []error) error {
	if bad == nil {
		return nil
	}
	return &Partial{bad}
}

// decodeList reads a list of policies, which says itself how many there are. With a *Partial error what could be read is good. What is wrong with an
// answer has no kind of its own: fault.Invalid would blame the request.
func decodeList(body []byte, tags bool) ([]policy.Rule, error) {
	var in struct {
		Total    *int              `json:"total_policies"`
		Policies []json.RawMessage `json:"policies"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, fmt.Errorf("list of policies is not what was expected: %v", err)
	}
	if in.Policies == nil {
		return nil, fmt.Errorf("list of policies is not what was expected: there is no member %q", "policies")
	}
	if in.Total != nil && *in.Total != len(in.Policies) {
		return nil, fmt.Errorf("list of policies is not complete: %d of %d", len(in.Policies), *in.Total)
	}
	good, bad := decodeRules(in.Policies, tags)
	return good, partial(bad)
}

// decodeUpdate reads an answer to a watch. With a *Partial error the update lacks what could not be read, and a full one is sealed without it.
func decodeUpdate(body []byte) (policy.Update, error) {
	var in struct {
		Revision revision.Revision `json:"revision"`
		Full     bool              `json:"full"`
		Set      []json.RawMessage `json:"set"`
		Gone     []json.RawMessage `json:"gone"`
		Count    int               `json:"count"`
		Sum      string            `json:"sum"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return policy.Update{}, fmt.Errorf("change of policies is not what was expected: %v", err)
	}
	if in.Revision.IsZero() {
		return policy.Update{}, fmt.Errorf("change of policies is not what was expected: there is no member %q", "revision")
	}
	sum, err := strconv.ParseUint(in.Sum, 16, 64)
	if err != nil || len(in.Sum) != 16 {
		return policy.Update{}, fmt.Errorf("change of policies is not what was expected: sum %.40q", in.Sum)
	}
	if in.Full && in.Count != len(in.Set) {
		return policy.Update{}, fmt.Errorf("list of policies is not complete: %d of %d", len(in.Set), in.Count)
	}
	u := policy.Update{Revision: in.Revision, Full: in.Full, Count: in.Count, Sum: policy.Digest(sum)}
	set, bad := decodeRules(in.Set, true)
	u.Set = set
	gone, badGone := decodeRules(in.Gone, false)
	for _, r := range gone {
		u.Gone = append(u.Gone, r.Policy)
	}
	if bad = append(bad, badGone...); bad != nil && in.Full {
		u.Set = sortRules(u.Set)
		u.Count, u.Sum = len(u.Set), policy.Sum(u.Set)
	}
	return u, partial(bad)
}
