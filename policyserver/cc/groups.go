package cc

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/secgroup"
)

// groupsPage is how many security groups are asked for at once: their rules may be long, and answers are bounded.
const groupsPage = "200"

// GroupsStamp returns when security groups changed last, in Cloud Controller's words, to be compared with itself only; "" when it is of a
// kind that does not say. It asks Cloud Controller's internal API.
func (c *Client) GroupsStamp(ctx context.Context) (string, error) {
	a, err := c.get(ctx, "/internal/v4/asg_latest_update")
	if err == nil && a.Status == http.StatusNotFound {
		return "", nil
	}
	var in struct {
		Last string `json:"last_update"`
	}
	if err == nil {
		err = a.Decode(&in)
	}
	if err == nil {
		if _, perr := time.Parse(time.RFC3339Nano, in.Last); perr != nil || len(in.Last) > 64 {
			err = fault.Unavailablef("last_update %.80q: expected a time such as 2026-01-02T03:04:05Z", in.Last)
		}
	}
	if err != nil {
		return "", fmt.Errorf("ask when security groups changed: %w", err)
	}
	return in.Last, nil
}

// Groups is the security groups that Cloud Controller has.
type Groups struct {
	Records []secgroup.Record // in its order
	Unread  []string          // GUIDs of others that it has, of which something essential cannot be read
	Reasons []string          // what was left out, and why
}

// SecurityGroups returns all security groups. A list that does not add up to what Cloud Controller says that there is, or has a group twice, is
// fault.Unavailable; but it may still have changed while its pages were read: only the stamp tells.
func (c *Client) SecurityGroups(ctx context.Context) (Groups, error) {
	var all Groups
	seen := map[string]bool{}
	total, err := c.list(ctx, "/v3/security_groups", "per_page="+groupsPage, func(raw json.RawMessage) error { return all.add(raw, seen) })
	if err == nil && total < 0 {
		err = fault.Unavailablef("answer does not say how many there are: there is no member pagination.total_results")
	}
	if err != nil {
		return Groups{}, fmt.Errorf("list security groups: %w", err)
	}
	return all, nil
}

// ccGroup is a security group of the v3 API.
type ccGroup struct {
	GUID    string `json:"guid"`
	Name    string `json:"name"`
	Enabled struct {
		Running bool `json:"running"`
		Staging bool `json:"staging"`
	} `json:"globally_enabled"`
	Rules         json.RawMessage `json:"rules"`
	Relationships struct {
		Running ccSpaces `json:"running_spaces"`
		Staging ccSpaces `json:"staging_spaces"`
	} `json:"relationships"`
}

type ccSpaces struct {
	Data []struct {
		GUID string `json:"guid"`
	} `json:"data"`
}

func (s ccSpaces) guids() ([]string, error) {
	var list []string
	for _, d := range s.Data {
		if d.GUID == "" {
			return nil, fault.Unavailablef("a space has no guid")
		}
		list = append(list, d.GUID)
	}
	slices.Sort(list)
	return slices.Compact(list), nil
}

// add takes over one group. One without a GUID spoils the list: nobody knows what is missing then.
func (g *Groups) add(raw json.RawMessage, seen map[string]bool) error {
	var id struct {
		GUID string `json:"guid"`
	}
	if err := json.Unmarshal(raw, &id); err != nil || id.GUID == "" {
		return fault.Unavailablef("security group %.100q has no guid", raw)
	}
	if seen[id.GUID] {
		return fault.Unavailablef("security group %.60q is there twice: the list changed while it was read", id.GUID)
	}
	if seen[id.GUID] = true; len(seen) > maxGroups {
		return fault.Unavailablef("there are more than %d security groups", maxGroups)
	}
	r, problems, err := parseGroup(raw)
	for _, p := range problems {
		g.Reasons = append(g.Reasons, fmt.Sprintf("security group %.60q: %v", id.GUID, p))
	}
	if err != nil {
		g.Reasons = append(g.Reasons, fmt.Sprintf("security group %.60q stays as it was: %v", id.GUID, err))
		g.Unread = append(g.Unread, id.GUID)
		return nil
	}
	g.Records = append(g.Records, r)
	return nil
}

// maxGroups bounds how many groups are read.
const maxGroups = 20000

// maxRules bounds the text of a group's rules in bytes: what the deployed tables hold.
const maxRules = 12 << 20

func parseGroup(raw json.RawMessage) (r secgroup.Record, problems []secgroup.Problem, err error) {
	var in ccGroup
	if err := json.Unmarshal(raw, &in); err != nil {
		return r, nil, err
	}
	r = secgroup.Record{GUID: in.GUID, Name: printable(in.Name), StagingDefault: in.Enabled.Staging, RunningDefault: in.Enabled.Running}
	if r.StagingSpaces, err = in.Relationships.Staging.guids(); err != nil {
		return r, nil, err
	}
	if r.RunningSpaces, err = in.Relationships.Running.guids(); err != nil {
		return r, nil, err
	}
	if r.Rules, problems, err = secgroup.Normalize(in.Rules); err != nil {
		return r, nil, err
	}
	if len(r.Rules) > maxRules {
		return r, nil, fault.Invalidf("its rules have %d bytes: expected at most %d", len(r.Rules), maxRules)
	}
	_, unread := r.Group()
	return r, append(problems, unread...), r.Validate()
}

// printable makes of any name one that can be kept. It is for people.
func printable(name string) string {
	name = strings.Map(func(r rune) rune {
		if r != ' ' && !unicode.IsGraphic(r) {
			return utf8.RuneError
		}
		return r
	}, strings.ToValidUTF8(name, string(utf8.RuneError)))
	for len(name) > secgroup.MaxName {
		_, n := utf8.DecodeLastRuneInString(name)
		name = name[:len(name)-n]
	}
	if name == "" {
		return "-"
	}
	return name
}
