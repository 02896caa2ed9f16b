package registrationhttp

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/registration"
)

// MaxAddresses bounds the addresses of one request for names: a listener takes 64 KiB of them.
const MaxAddresses = 1024

// namesAnswer is what PathNames answers.
type namesAnswer struct {
	Revision string                             `json:"revision"`
	Names    map[netip.Addr][]registration.Name `json:"names"`

	// Groups are the policy groups for which the names were registered, where that was said.
	Groups map[netip.Addr]map[registration.Name]string `json:"groups,omitempty"`
}

// NamesHandler answers PathNames: which names stand for the addresses that are asked for, sorted; an address without names is not in the
// answer. The revision, which is the ETag as well, changes when and only when the answer does. Until warm it is 503: names that are not
// known yet must not be taken for gone.
func NamesHandler(t *registration.Table, warm func() bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != PathNames:
			http.NotFound(w, r)
			return
		case r.Method != http.MethodGet:
			w.Header().Set("Allow", http.MethodGet)
			http.Error(w, http.StatusText(http.StatusMethodNotAllowed), http.StatusMethodNotAllowed)
			return
		}
		asked, err := askedAddresses(r.URL.Query()["address"])
		if err == nil && !warm() {
			err = fault.Unavailablef("address table is not warm")
			w.Header().Set("Retry-After", "1")
		}
		if err != nil {
			httpjson.WriteError(w, httpjson.Status(fault.Of(err)), err.Error())
			return
		}
		answer := namesOf(t, asked)
		tag := `"` + answer.Revision + `"`
		w.Header().Set("ETag", tag)
		w.Header().Set("Cache-Control", "no-cache")
		if matches(r.Header.Get("If-None-Match"), tag) {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		httpjson.Write(w, http.StatusOK, answer)
	})
}

func askedAddresses(texts []string) ([]netip.Addr, error) {
	if len(texts) > MaxAddresses {
		return nil, fault.Invalidf("%d addresses are asked for: expected at most %d", len(texts), MaxAddresses)
	}
	list := make([]netip.Addr, 0, len(texts))
	for _, s := range texts {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return nil, fault.Invalidf("address %.60q: expected an IP address", s)
		}
		list = append(list, a.Unmap())
	}
	return list, nil
}

func namesOf(t *registration.Table, asked []netip.Addr) namesAnswer {
	n := namesAnswer{Names: map[netip.Addr][]registration.Name{}, Groups: map[netip.Addr]map[registration.Name]string{}}
	for _, a := range asked {
		var names []registration.Name
		groups := map[registration.Name]string{}
		for _, r := range t.At(a) {
			names = append(names, r.Name)
			if r.Group != "" {
				groups[r.Name] = r.Group
			}
		}
		slices.Sort(names)
		if len(names) > 0 {
			n.Names[a] = names
		}
		if len(groups) > 0 {
			n.Groups[a] = groups
		}
	}
	b, err := json.Marshal(n.Names) // keys are sorted
	var more []byte
	if err == nil && len(n.Groups) > 0 {
		more, err = json.Marshal(n.Groups)
	}
	if err != nil {
		panic(err) // of our own types
	}
	b = append(b, more...)
	sum := sha256.Sum256(b)
	n.Revision = hex.EncodeToString(sum[:16])
	return n
}

// matches reads If-None-Match (RFC 9110 section 13.1.2) as far as our tags go.
func matches(header, tag string) bool {
	for t := range strings.SplitSeq(header, ",") {
		if t = strings.TrimSpace(t); strings.TrimPrefix(t, "W/") == tag || t == "*" {
			return true
		}
	}
	return false
}

// Names asks a NamesHandler. It is safe for concurrent use, and remembers the last answer, which the server need not send again.
type Names struct {
	base    string
	http    *http.Client
	timeout time.Duration

	mu    sync.Mutex
	query string // of last
	last  namesAnswer
}

// maxNames bounds an answer in bytes.
const maxNames = 16 << 20

// NewNames returns a client of the server at base ("http://127.0.0.1:8056"). It opens no connection. A request may take timeout, by
// default 5 s.
func NewNames(base string, timeout time.Duration) *Names {
	if timeout <= 0 {
		timeout = 5 * time.Second
	}
	return &Names{base: strings.TrimSuffix(base, "/"), timeout: timeout, http: &http.Client{
		Transport: &http.Transport{
			DialContext:     (&net.Dialer{Timeout: timeout}).DialContext,
			IdleConnTimeout: 90 * time.Second, DisableCompression: true, MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close closes connections that are not in use.
func (c *Names) Close() { c.http.CloseIdleConnections() }

// Of returns the names that stand for each of the addresses, at most MaxAddresses, and a revision that is another one when the answer to
// these addresses is. An address that is not in the answer has none. A server that cannot be reached, or does not know yet, is
// fault.Unavailable: what was known before still holds then. The caller must not change what is returned.
func (c *Names) Of(ctx context.Context, addresses []netip.Addr) (names map[netip.Addr][]registration.Name, revision string, err error) {
	if len(addresses) > MaxAddresses {
		return nil, "", fault.Invalidf("%d addresses are asked for: expected at most %d", len(addresses), MaxAddresses)
	}
	q := url.Values{}
	for _, a := range addresses {
		q.Add("address", a.Unmap().String())
	}
	a, err := c.ask(ctx, q.Encode())
	if err != nil {
		return nil, "", fmt.Errorf("ask for names: %w", err)
	}
	return a.Names, a.Revision, nil
}

// Owner is an address and the policy group of who has it now.
type Owner struct {
	Address netip.Addr
	Group   string
}

// OfOwners is Of for addresses whose present owners are known. A name that was registered at an address for another group is in others: it is that of
// who had the address before, and has not been taken back yet. A name of which nobody said the group is the owner's.
func (c *Names) OfOwners(ctx context.Context, owners []Owner) (names, others map[netip.Addr][]registration.Name, err error) {
	if len(owners) > MaxAddresses {
		return nil, nil, fault.Invalidf("%d addresses are asked for: expected at most %d", len(owners), MaxAddresses)
	}
	q := url.Values{}
	for _, o := range owners {
		q.Add("address", o.Address.Unmap().String())
	}
	a, err := c.ask(ctx, q.Encode())
	if err != nil {
		return nil, nil, fmt.Errorf("ask for names: %w", err)
	}
	names, others = map[netip.Addr][]registration.Name{}, map[netip.Addr][]registration.Name{}
	for _, o := range owners {
		at := o.Address.Unmap()
		for _, n := range a.Names[at] {
			into := names
			if g := a.Groups[at][n]; g != "" && g != o.Group {
				into = others
			}
			into[at] = append(into[at], n)
		}
	}
	return names, others, nil
}

func (c *Names) ask(ctx context.Context, query string) (namesAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+PathNames+"?"+query, nil)
	if err != nil {
		return namesAnswer{}, fault.New(fault.Invalid, err)
	}
	known, has := c.known(query)
	if has {
		req.Header.Set("If-None-Match", `"`+known.Revision+`"`)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return namesAnswer{}, fault.New(fault.Unavailable, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxNames+1))
	switch {
	case err != nil:
		return namesAnswer{}, fault.New(fault.Unavailable, fmt.Errorf("read answer: %w", err))
	case has && resp.StatusCode == http.StatusNotModified:
		return known, nil
	case resp.StatusCode != http.StatusOK:
		e := &httpjson.StatusError{Status: resp.StatusCode, Text: string(b[:min(len(b), 200)]), RetryAfter: httpjson.RetryAfter(resp.Header)}
		return namesAnswer{}, fault.New(httpjson.Kind(resp.StatusCode), e)
	}
	a, err := decodeNames(b)
	if err != nil {
		return namesAnswer{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.query, c.last = query, a
	return a, nil
}

func (c *Names) known(query string) (namesAnswer, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last, c.last.Revision != "" && c.query == query
}

// decodeNames reads an answer. What cannot be a name is an error: a certificate for a part of the names is not what was asked for.
func decodeNames(b []byte) (namesAnswer, error) {
	var a namesAnswer
	if len(b) > maxNames {
		return a, fmt.Errorf("answer is longer than %d bytes", maxNames)
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return namesAnswer{}, fmt.Errorf("answer is not what was expected: %w", err)
	}
	if a.Names == nil || a.Revision == "" || strings.ContainsFunc(a.Revision, func(r rune) bool { return r <= ' ' || r == '"' || r > '~' }) {
		return namesAnswer{}, errors.New("answer is not what was expected: it has no revision or no names")
	}
	for address, names := range a.Names {
		for _, n := range names {
			if p, err := registration.ParseName(string(n)); err != nil || p != n {
				return namesAnswer{}, fmt.Errorf("answer is not what was expected: %v is called %.80q", address, n)
			}
		}
	}
	return a, nil
}
