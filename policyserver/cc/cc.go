// Package cc asks Cloud Foundry's Cloud Controller which apps there are, in which spaces, and in which of these somebody is a developer.
//
// It uses the v3 API, and v2 where a Cloud Controller has no v3 roles. An answer that does not add up, such as fewer apps than it
// says there are, is fault.Unavailable: what it lacks is not taken for gone.
//
// Use: c := cc.New(cc.Config{Base: url, Token: uaa}, client); spaces, err := c.Spaces(ctx, guids).
package cc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policyserver/outbound"
)

// Tokens gives a token that Cloud Controller accepts. *auth.UAA is one.
type Tokens struct {
	Token  func(ctx context.Context) (string, error)
	Forget func(token string)
}

// Config is how Cloud Controller is reached.
type Config struct {
	Base   string // "https://cloud-controller-ng.service.cf.internal:9024"
	Tokens Tokens
	Chunk  int // GUIDs in one request, default 100
}

// Client asks Cloud Controller. It is safe for concurrent use.
type Client struct {
	cfg Config
	out *outbound.Client
}

// New returns a client. It asks nothing yet.
func New(cfg Config, out *outbound.Client) *Client {
	cfg.Base = strings.TrimSuffix(cfg.Base, "/")
	if cfg.Chunk <= 0 {
		cfg.Chunk = 100
	}
	return &Client{cfg: cfg, out: out}
}

// maxPages bounds the pages of one list that are read.
const maxPages = 1000

// Spaces returns the spaces of apps, by GUID. Apps that Cloud Controller does not know are not in it.
func (c *Client) Spaces(ctx context.Context, apps []string) (map[string]string, error) {
	found := make(map[string]string, len(apps))
	for _, part := range evenly(apps, c.cfg.Chunk) {
		asked, there := make(map[string]bool, len(part)), make(map[string]bool, len(part))
		for _, g := range part {
			asked[g] = true
		}
		q := "guids=" + url.QueryEscape(strings.Join(part, ",")) + "&per_page=" + strconv.Itoa(len(part))
		total, err := c.list(ctx, "/v3/apps", q, func(raw json.RawMessage) error {
			app, space, err := parseApp(raw)
			there[app] = true
			if err == nil && asked[app] {
				found[app] = space
			}
			return err
		})
		if err == nil && len(there) != total { // a policy of an app that is left out would be taken for stale
			err = fault.Unavailablef("answer is not complete: %d apps of %d", len(there), total)
		}
		if err != nil {
			return nil, fmt.Errorf("list apps: %w", err)
		}
	}
	return found, nil
}

// Parts cuts a list of GUIDs into what is asked at once.
func (c *Client) Parts(guids []string) [][]string { return evenly(guids, c.cfg.Chunk) }

// evenly cuts a list into as few parts of at most n as possible, of about the same length: that not one of a part's apps is known is then
// a surprise for every part.
func evenly(list []string, n int) [][]string {
	if len(list) == 0 {
		return nil
	}
	parts := (len(list) + n - 1) / n
	return slices.Collect(slices.Chunk(list, (len(list)+parts-1)/parts))
}

// parseApp reads an app of the v3 API.
func parseApp(raw json.RawMessage) (guid, space string, err error) {
	var in struct {
		GUID  string `json:"guid"`
		Links struct {
			Space struct {
				Href string `json:"href"`
			} `json:"space"`
		} `json:"links"`
		Relationships struct {
			Space struct {
				Data struct {
					GUID string `json:"guid"`
				} `json:"data"`
			} `json:"space"`
		} `json:"relationships"`
	}
	if err := json.Unmarshal(raw, &in); err != nil {
		return "", "", fault.Unavailablef("app is not what was expected: %v", err)
	}
	space = in.Relationships.Space.Data.GUID
	if u, err := url.Parse(in.Links.Space.Href); err == nil && u.Path != "" {
		space = path.Base(u.Path)
	}
	if in.GUID == "" || space == "" || space == "." || space == "/" {
		return "", "", fault.Unavailablef("app %.100q has no guid or no space", in.GUID)
	}
	return in.GUID, space, nil
}

// DevelopedOf returns in which of the given spaces a user is a space developer.
func (c *Client) DevelopedOf(ctx context.Context, user string, spaces []string) (map[string]bool, error) {
	found := make(map[string]bool)
	for _, part := range evenly(spaces, c.cfg.Chunk) {
		q := "types=space_developer&user_guids=" + url.QueryEscape(user) + "&space_guids=" + url.QueryEscape(strings.Join(part, ",")) +
			"&per_page=" + strconv.Itoa(len(part))
		err := c.roles(ctx, q, user, found)
		if errors.Is(err, fault.NotFound) {
			return c.developedV2(ctx, user)
		}
		if err != nil {
			return nil, fmt.Errorf("list roles: %w", err)
		}
	}
	return found, nil
}

// roles adds the spaces of roles to found. Each must be of the user that was asked for: a Cloud Controller that overlooks the question must not make
// anybody a developer of anything.
func (c *Client) roles(ctx context.Context, query, user string, found map[string]bool) error {
	_, err := c.list(ctx, "/v3/roles", query, func(raw json.RawMessage) error {
		var in struct {
			Type          string `json:"type"`
			Relationships struct {
				User  reference `json:"user"`
				Space reference `json:"space"`
			} `json:"relationships"`
		}
		if err := json.Unmarshal(raw, &in); err != nil {
			return fault.Unavailablef("role is not what was expected: %v", err)
		}
		if space := in.Relationships.Space.Data.GUID; space != "" && in.Type == "space_developer" && in.Relationships.User.Data.GUID == user {
			found[space] = true
		}
		return nil
	})
	return err
}

// reference is how one thing of the v3 API points at another.
type reference struct {
	Data struct {
		GUID string `json:"guid"`
	} `json:"data"`
}

// developedV2 returns all spaces in which a user is a developer, as the v2 API tells it. A user that it does not know is none anywhere.
func (c *Client) developedV2(ctx context.Context, user string) (map[string]bool, error) {
	found := map[string]bool{}
	if user == "." || user == ".." || url.PathEscape(user) != user { // no GUID, and perhaps another path to those who tidy paths
		return found, nil
	}
	next := "/v2/users/" + user + "/spaces?results-per-page=100"
	for range maxPages {
		a, err := c.get(ctx, next)
		if err == nil && a.Status == http.StatusNotFound {
			return map[string]bool{}, nil
		}
		var in struct {
			Next      *string `json:"next_url"`
			Resources []struct {
				Metadata struct {
					GUID string `json:"guid"`
				} `json:"metadata"`
			} `json:"resources"`
		}
		if err == nil {
			err = a.Decode(&in)
		}
		if err != nil {
			return nil, fmt.Errorf("list spaces of a user: %w", err)
		}
		for _, s := range in.Resources {
			found[s.Metadata.GUID] = true
		}
		delete(found, "")
		if in.Next == nil || *in.Next == "" {
			return found, nil
		}
		if next = *in.Next; !strings.HasPrefix(next, "/v2/") {
			return nil, fault.Unavailablef("list spaces of a user: next page is %.100q", next)
		}
	}
	return nil, fault.Unavailablef("list spaces of a user: more than %d pages", maxPages)
}

// Developed returns all spaces in which a user is a space developer.
func (c *Client) Developed(ctx context.Context, user string) (map[string]bool, error) {
	found := map[string]bool{}
	err := c.roles(ctx, "types=space_developer&user_guids="+url.QueryEscape(user)+"&per_page="+most, user, found)
	if errors.Is(err, fault.NotFound) {
		return c.developedV2(ctx, user)
	}
	if err != nil {
		return nil, fmt.Errorf("list roles: %w", err)
	}
	return found, nil
}

// most is the longest page that Cloud Controller gives.
const most = "5000"

// Apps returns the apps of spaces.
func (c *Client) Apps(ctx context.Context, spaces []string) (map[string]bool, error) {
	found := map[string]bool{}
	for _, part := range evenly(spaces, c.cfg.Chunk) {
		asked := make(map[string]bool, len(part))
		for _, s := range part {
			asked[s] = true
		}
		q := "space_guids=" + url.QueryEscape(strings.Join(part, ",")) + "&per_page=" + most
		_, err := c.list(ctx, "/v3/apps", q, func(raw json.RawMessage) error {
			app, space, err := parseApp(raw)
			if err == nil && asked[space] {
				found[app] = true
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("list apps: %w", err)
		}
	}
	return found, nil
}

// list calls each for every resource of all pages of a v3 list, which must add up to what it says that there is. It returns that, -1 when it does not say.
func (c *Client) list(ctx context.Context, path, query string, each func(json.RawMessage) error) (total int, err error) {
	seen := 0
	for page := 1; page <= maxPages; page++ {
		p := path + "?" + query
		if page > 1 {
			p += "&page=" + strconv.Itoa(page)
		}
		a, err := c.get(ctx, p)
		if err != nil {
			return 0, err
		}
		if a.Status == http.StatusNotFound {
			return 0, fault.NotFoundf("cloud controller has no %s", path)
		}
		in, err := parsePage(a)
		if err != nil {
			return 0, err
		}
		for _, raw := range in.Resources {
			if err := each(raw); err != nil {
				return 0, err
			}
		}
		seen += len(in.Resources)
		if page >= in.Pagination.Pages {
			n := in.Pagination.Results
			if n == nil {
				return -1, nil
			}
			if *n != seen {
				return 0, fault.Unavailablef("%s: answer is not complete: %d of %d", path, seen, *n)
			}
			return seen, nil
		}
	}
	return 0, fault.Unavailablef("%s: more than %d pages", path, maxPages)
}

// pageOf is one page of a v3 list.
type pageOf struct {
	Pagination struct {
		Pages   int  `json:"total_pages"`
		Results *int `json:"total_results"` // nil: it does not say
	} `json:"pagination"`
	Resources []json.RawMessage `json:"resources"`
}

func parsePage(a outbound.Answer) (pageOf, error) {
	var in pageOf
	if err := a.Decode(&in); err != nil {
		return in, err
	}
	if in.Resources == nil {
		return in, fault.Unavailablef("answer is not what was expected: there is no member %q", "resources")
	}
	return in, nil
}

// get asks with policy-server's token; one that is not accepted is forgotten and another tried.
func (c *Client) get(ctx context.Context, pathAndQuery string) (outbound.Answer, error) {
	for again := false; ; again = true {
		token, err := c.cfg.Tokens.Token(ctx)
		if err != nil {
			return outbound.Answer{}, err
		}
		a, err := c.out.Ask(ctx, func(ctx context.Context) (*http.Request, error) {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.cfg.Base+pathAndQuery, http.NoBody)
			if err == nil {
				req.Header.Set("Authorization", "bearer "+token)
				req.Header.Set("Accept", "application/json")
			}
			return req, err
		})
		if err != nil || a.Status != http.StatusUnauthorized || again {
			return a, err
		}
		c.cfg.Tokens.Forget(token)
	}
}
