package policyhttp

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/revision"
	"code.cloudfoundry.org/silk/secgroup"
)

// GroupPage is a part of a list of security groups, all of one revision.
type GroupPage struct {
	Revision revision.Revision
	Groups   []secgroup.Record
	Next     int64 // what to ask from for the next part; 0: this is the last
}

// wireRecord is a security group as agents get it. Its rules are a text that holds JSON.
type wireRecord struct {
	GUID           string           `json:"guid"`
	Name           string           `json:"name"`
	Rules          string           `json:"rules"`
	StagingDefault bool             `json:"staging_default"`
	RunningDefault bool             `json:"running_default"`
	StagingSpaces  []string         `json:"staging_space_guids"`
	RunningSpaces  []string         `json:"running_space_guids"`
	Members        []identity.Group `json:"policy_groups"`
}

func (w wireRecord) record() secgroup.Record {
	return secgroup.Record{GUID: w.GUID, Name: w.Name, Rules: w.Rules, StagingDefault: w.StagingDefault, RunningDefault: w.RunningDefault,
		StagingSpaces: orNil(w.StagingSpaces), RunningSpaces: orNil(w.RunningSpaces), Members: orNil(w.Members)}
}

func orNil[T any](list []T) []T {
	if len(list) == 0 {
		return nil
	}
	return list
}

// appendRecord writes a group, with the policy groups that it is bound to only for who knows them. Deployed agents read the text of the
// rules by Go's strconv.Unquote, which knows neither \/ nor pairs of surrogates: appendString writes neither.
func appendRecord(b []byte, r *secgroup.Record, members bool) []byte {
	b = append(b, `{"guid":`...)
	b = appendString(b, r.GUID)
	b = append(b, `,"name":`...)
	b = appendString(b, r.Name)
	b = append(b, `,"rules":`...)
	b = appendString(b, r.Rules)
	b = append(b, `,"staging_default":`...)
	b = strconv.AppendBool(b, r.StagingDefault)
	b = append(b, `,"running_default":`...)
	b = strconv.AppendBool(b, r.RunningDefault)
	b = append(b, `,"staging_space_guids":`...)
	b = appendTexts(b, r.StagingSpaces)
	b = append(b, `,"running_space_guids":`...)
	b = appendTexts(b, r.RunningSpaces)
	if members {
		b = append(b, `,"policy_groups":`...)
		b = appendTexts(b, r.Members)
	}
	return append(b, '}')
}

func appendTexts[T ~string](b []byte, list []T) []byte {
	b = append(b, '[')
	for i, s := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, string(s))
	}
	return append(b, ']')
}

// wireGroupWatch is what an agent sends.
type wireGroupWatch struct {
	Host    string            `json:"host"`
	Spaces  []string          `json:"spaces"`
	Members []identity.Group  `json:"policy_groups"`
	Since   revision.Revision `json:"since"`
	Sum     string            `json:"sum,omitempty"`
	Wait    *int              `json:"wait,omitempty"` // seconds; default 30
}

// ask returns what the body of a watch asks for; what is wrong with it is fault.Invalid.
func (w wireGroupWatch) ask() (a secgroup.Ask, err error) {
	if err := checkHost(w.Host); err != nil {
		return a, err
	}
	if len(w.Spaces)+len(w.Members) > maxGroups {
		return a, fault.Invalidf("%d spaces and policy groups: expected at most %d", len(w.Spaces)+len(w.Members), maxGroups)
	}
	for i, s := range w.Spaces {
		if i > 0 && w.Spaces[i-1] >= s {
			return a, fault.Invalidf("spaces are not sorted: %.60q follows %.60q", s, w.Spaces[i-1])
		}
	}
	for i, g := range w.Members {
		if i > 0 && w.Members[i-1] >= g {
			return a, fault.Invalidf("policy groups are not sorted: %.60q follows %.60q", string(g), string(w.Members[i-1]))
		}
	}
	a = secgroup.Ask{Host: plainHost(w.Host), Spaces: w.Spaces, Members: w.Members, Since: w.Since}
	if !w.Since.IsZero() {
		a.Sum, err = secgroup.ParseDigest(w.Sum)
	}
	return a, err
}

// encodeGroups returns the body of an answer to a watch of security groups.
func encodeGroups(u secgroup.Update) []byte {
	size := 256
	for i := range u.Groups {
		size += len(u.Groups[i].Rules)*5/4 + 512
	}
	b := make([]byte, 0, size)
	b = append(b, `{"revision":"`...)
	b = append(b, u.Revision.String()...)
	b = append(b, `","full":`...)
	b = strconv.AppendBool(b, u.Full)
	b = append(b, `,"security_groups":[`...)
	for i := range u.Groups {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendRecord(b, &u.Groups[i], true)
	}
	b = append(b, `],"count":`...)
	b = strconv.AppendInt(b, int64(u.Count), 10)
	b = append(b, `,"sum":"`...)
	b = append(b, u.Sum.String()...)
	return append(b, `"}`...)
}

// decodeGroups reads such a body. A list that does not add up to its own seal is fault.Unavailable: it is not complete, and nothing of it
// may be used.
func decodeGroups(body []byte) (secgroup.Update, error) {
	var in struct {
		Revision *revision.Revision `json:"revision"`
		Full     *bool              `json:"full"`
		Groups   []wireRecord       `json:"security_groups"`
		Count    *int               `json:"count"`
		Sum      *secgroup.Digest   `json:"sum"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		return secgroup.Update{}, fault.Unavailablef("answer is not what was expected: %w", err)
	}
	if in.Revision == nil || in.Revision.IsZero() || in.Full == nil || in.Count == nil || in.Sum == nil || *in.Full && in.Groups == nil {
		return secgroup.Update{}, fault.Unavailablef("answer is not what was expected: a member of revision, full, security_groups, count and sum is missing")
	}
	u := secgroup.Update{Revision: *in.Revision, Full: *in.Full, Count: *in.Count, Sum: *in.Sum}
	if !u.Full {
		return u, nil
	}
	for _, w := range in.Groups {
		u.Groups = append(u.Groups, w.record())
	}
	if _, err := u.Apply(nil); err != nil {
		return secgroup.Update{}, fault.New(fault.Unavailable, err)
	}
	return u, nil
}

// wireKept is a security group as people see and write it. Rules may be in Silk's form or in Cloud Controller's.
type wireKept struct {
	GUID            string           `json:"guid"`
	Name            string           `json:"name"`
	Rules           json.RawMessage  `json:"rules"`
	StagingDefault  bool             `json:"staging_default"`
	RunningDefault  bool             `json:"running_default"`
	StagingSpaces   []string         `json:"staging_spaces"`
	RunningSpaces   []string         `json:"running_spaces"`
	Members         []identity.Group `json:"policy_groups"`
	CloudController bool             `json:"cloud_controller"`
}

// showKept returns a group as it is shown, its rules as they are written.
func showKept(k secgroup.Kept) wireKept {
	rules := json.RawMessage(k.Rules)
	if !json.Valid(rules) {
		rules = json.RawMessage("[]")
	}
	return wireKept{k.GUID, k.Name, rules, k.StagingDefault, k.RunningDefault, orEmpty(k.StagingSpaces), orEmpty(k.RunningSpaces), orEmpty(k.Members), k.CloudController}
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

func (w wireKept) kept() secgroup.Kept {
	return secgroup.Kept{CloudController: w.CloudController, Record: secgroup.Record{GUID: w.GUID, Name: w.Name, Rules: string(w.Rules), StagingDefault: w.StagingDefault,
		RunningDefault: w.RunningDefault, StagingSpaces: orNil(w.StagingSpaces), RunningSpaces: orNil(w.RunningSpaces), Members: orNil(w.Members)}}
}

// rulesText reads rules in either form that people write, and returns them in Cloud Controller's.
func rulesText(raw json.RawMessage) (string, error) {
	form := secgroup.Own
	var keys []map[string]json.RawMessage
	if json.Unmarshal(raw, &keys) == nil && len(keys) > 0 {
		for k := range keys[0] {
			if strings.EqualFold(k, "destination") {
				form = secgroup.CloudController
			}
		}
	}
	rules, err := form.Parse(raw)
	return secgroup.Format(rules), err
}

// wireScope is for whom a group holds.
type wireScope struct {
	StagingDefault bool             `json:"staging_default,omitempty"`
	RunningDefault bool             `json:"running_default,omitempty"`
	StagingSpaces  []string         `json:"staging_spaces,omitempty"`
	RunningSpaces  []string         `json:"running_spaces,omitempty"`
	Members        []identity.Group `json:"policy_groups,omitempty"`
}

// wireGroupChange is what becomes different of a group.
type wireGroupChange struct {
	Name   *string         `json:"name,omitempty"`
	Rules  json.RawMessage `json:"rules,omitempty"`
	Bind   wireScope       `json:"bind"`
	Unbind wireScope       `json:"unbind"`
}

// decodeStrictly reads a body in which every key is known.
func decodeStrictly(body []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fault.Invalidf("body is not what was expected: %w", err)
	}
	if d.More() {
		return fault.Invalidf("body is not what was expected: something follows the object")
	}
	return nil
}
