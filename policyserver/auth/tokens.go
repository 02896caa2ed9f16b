package auth

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy/policyhttp"
)

// Tokens knows callers by bearer tokens whose SHA-256 stands in a file:
//
//	{"tokens": [{"name": "ada", "sha256": "9f86d0...", "admin": true}, {"name": "ci", "sha256": "60303a...", "groups": ["shop-*"]}]}
//
// The file is read again when it changes; one that cannot be read leaves what was known. It is safe for concurrent use.
type Tokens struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	known   []token
	looked  time.Time
	sum     [sha256.Size]byte // of the file when known was read
	failing bool
}

type token struct {
	name   string
	hash   [sha256.Size]byte
	scopes []string
	groups []string
}

// OpenTokens reads the file at path.
func OpenTokens(path string, log *slog.Logger) (*Tokens, error) {
	t := &Tokens{path: path, log: log}
	return t, t.load()
}

// every is the least time between two looks whether the file has changed.
const every = time.Second

// maxTokens bounds the file in bytes.
const maxTokens = 4 << 20

// load reads the file. Only its text tells whether it has changed: a token replaced by another leaves the size, and many tools the time.
func (t *Tokens) load() error {
	t.looked = time.Now()
	f, err := os.Open(t.path)
	if err != nil {
		return fmt.Errorf("token file: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxTokens+1))
	if err != nil {
		return fmt.Errorf("token file: %w", err)
	}
	if len(b) > maxTokens {
		return fault.Invalidf("token file %s: expected at most %d bytes", t.path, maxTokens)
	}
	sum := sha256.Sum256(b)
	if t.known != nil && sum == t.sum {
		return nil
	}
	known, err := parseTokens(b)
	if err != nil {
		return fmt.Errorf("token file %s: %w", t.path, err)
	}
	t.known, t.sum = known, sum
	return nil
}

// parseTokens reads the text of a token file; what is wrong with it is fault.Invalid.
func parseTokens(b []byte) ([]token, error) {
	var in struct {
		Tokens []struct {
			Name   string   `json:"name"`
			SHA256 string   `json:"sha256"`
			Admin  bool     `json:"admin"`
			Groups []string `json:"groups"`
		} `json:"tokens"`
	}
	if err := json.Unmarshal(b, &in); err != nil {
		return nil, fault.New(fault.Invalid, err)
	}
	known := make([]token, 0, len(in.Tokens))
	for i, w := range in.Tokens {
		h, err := hex.DecodeString(w.SHA256)
		switch {
		case w.Name == "":
			return nil, fault.Invalidf("tokens[%d]: has no name", i)
		case err != nil || len(h) != sha256.Size:
			return nil, fault.Invalidf("tokens[%d] (%s): sha256: expected %d hexadecimal digits", i, w.Name, 2*sha256.Size)
		case w.Admin && w.Groups != nil:
			return nil, fault.Invalidf("tokens[%d] (%s): has both admin and groups: an admin may write every group", i, w.Name)
		}
		k := token{name: w.Name, hash: [sha256.Size]byte(h)}
		k.scopes, k.groups = rights(w.Admin, w.Groups)
		known = append(known, k)
	}
	return known, nil
}

// rights returns the scopes and groups of one who is an admin or may write some groups.
func rights(admin bool, groups []string) (scopes, may []string) {
	if admin {
		return []string{policyhttp.Admin}, []string{}
	}
	return []string{policyhttp.Writer}, append([]string{}, groups...)
}

// current returns what the file says, or said last.
func (t *Tokens) current() []token {
	t.mu.Lock()
	defer t.mu.Unlock()
	if time.Since(t.looked) < every {
		return t.known
	}
	switch err := t.load(); {
	case err != nil && !t.failing:
		t.failing = true
		t.log.Error("token file cannot be read: what it said before counts", "error", err)
	case err == nil && t.failing:
		t.failing = false
		t.log.Info("token file can be read again", "path", t.path)
	}
	return t.known
}

// Authenticate is a Method. All tokens are compared, in constant time, so that an answer tells nothing of them.
func (t *Tokens) Authenticate(r *http.Request) (policyhttp.Caller, error) {
	text, err := bearer(r)
	if err != nil {
		return policyhttp.Caller{}, err
	}
	h := sha256.Sum256([]byte(text))
	known := t.current()
	found := -1
	for i := range known {
		found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(h[:], known[i].hash[:]), i, found)
	}
	if found < 0 {
		return policyhttp.Caller{}, fault.Deniedf("token is not known")
	}
	k := known[found]
	return policyhttp.Caller{Name: k.name, Subject: k.name, Scopes: k.scopes, Groups: k.groups}, nil
}
