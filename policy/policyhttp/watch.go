package policyhttp

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

const (
	maxWatch  = 4 << 20 // of the body of a watch, in bytes
	maxHost   = 255     // of a host's name, in bytes
	maxGroups = 20000   // of a host
	short     = 256     // rules in an answer that needs no place among the lists
)

// wireWatch is what an agent sends. Groups may be left out when the server knows the set.
type wireWatch struct {
	Host    string            `json:"host"`
	Set     string            `json:"set"`              // setOf(Groups)
	Groups  []identity.Group  `json:"groups,omitempty"` // sorted, each once
	Since   revision.Revision `json:"since"`
	InForce revision.Revision `json:"in_force"`
	Wait    *int              `json:"wait,omitempty"` // seconds; default 30
}

// setID is the digest of a list of groups.
type setID [sha256.Size]byte

// setOf returns the digest of a sorted list of groups: of their names, each followed by a newline, which no name has.
func setOf(groups []identity.Group) setID {
	h := sha256.New()
	var b []byte
	for _, g := range groups {
		b = append(append(b[:0], g...), '\n')
		h.Write(b)
	}
	return setID(h.Sum(nil))
}

func (id setID) String() string { return hex.EncodeToString(id[:]) }

// decodeWatch reads the body of a watch; what is wrong with it is fault.Invalid. The groups of the ask are nil if they were left out.
func decodeWatch(body []byte) (policy.Ask, setID, time.Duration, error) {
	var in wireWatch
	if err := json.Unmarshal(body, &in); err != nil {
		return policy.Ask{}, setID{}, 0, fault.Invalidf("body is not what was expected: %v", err)
	}
	if err := checkHost(in.Host); err != nil {
		return policy.Ask{}, setID{}, 0, err
	}
	id, err := parseSet(in.Set)
	if err != nil {
		return policy.Ask{}, setID{}, 0, err
	}
	wait, err := waitFor(in.Wait)
	if err != nil {
		return policy.Ask{}, setID{}, 0, err
	}
	a := policy.Ask{Host: plainHost(in.Host), Groups: in.Groups, Since: in.Since, InForce: in.InForce}
	if in.Groups != nil {
		err = checkGroups(in.Groups, id)
	}
	return a, id, wait, err
}

// checkHost reports, as fault.Invalid, what cannot be the name of a host.
func checkHost(host string) error {
	if host == "" || len(host) > maxHost || strings.ContainsFunc(host, func(r rune) bool { return r != ' ' && !unicode.IsGraphic(r) }) {
		return fault.Invalidf("host %.100q: expected a name of 1 to %d printable bytes", host, maxHost)
	}
	return nil
}

// plainHost returns the name of a host in one spelling: addresses can be written in many ways.
func plainHost(host string) string {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.Unmap().WithZone("").String()
	}
	return host
}

// waitFor returns how long a watch waits.
func waitFor(seconds *int) (time.Duration, error) {
	wait := 30
	if seconds != nil {
		wait = *seconds
	}
	if wait < 0 {
		return 0, fault.Invalidf("wait %d: expected seconds, at most %d", wait, MaxWait/time.Second)
	}
	return min(time.Duration(min(wait, 3600))*time.Second, MaxWait), nil
}

func parseSet(s string) (setID, error) {
	var id setID
	if b, err := hex.DecodeString(s); err != nil || copy(id[:], b) != len(id) || len(b) != len(id) {
		return id, fault.Invalidf("set %.80q: expected the SHA-256 of the groups as %d hexadecimal digits", s, 2*len(id))
	}
	return id, nil
}

func checkGroups(groups []identity.Group, id setID) error {
	if len(groups) > maxGroups {
		return fault.Invalidf("%d groups: expected at most %d", len(groups), maxGroups)
	}
	for i, g := range groups {
		if err := g.Validate(); err != nil {
			return err
		}
		if i > 0 && groups[i-1] >= g {
			return fault.Invalidf("groups are not sorted: %q follows %q", g, groups[i-1])
		}
	}
	if got := setOf(groups); got != id {
		return fault.Invalidf("set %v is not that of the groups, which is %v", id, got)
	}
	return nil
}

// watch answers when rules that touch the host's groups differ from those it has, or after the wait.
//
// Thousands of goroutines stand in its call of the store. The stack of one shrinks to 8 KiB only while less than a quarter of 16 KiB is in use, of
// which net/http has more than a third: what is not needed during the wait is done in functions that have returned by then.
func (h *internal) watch(w http.ResponseWriter, r *http.Request) {
	peer := peerOf(r)
	if !h.watchers.enter(w, r, peer) {
		return
	}
	defer h.watchers.exit(peer)
	a, wait, ok := h.prepare(w, r)
	if !ok {
		return
	}
	u, err := h.b.Watch(r.Context(), a, wait)
	h.answer(w, r, u, err)
}

// prepare reads the body and makes the connection wait, or answers.
//
//go:noinline
func (h *internal) prepare(w http.ResponseWriter, r *http.Request) (policy.Ask, time.Duration, bool) {
	body, release, ok, err := h.bodies.body(w, r, peerOf(r), maxWatch)
	defer release()
	if !ok {
		return policy.Ask{}, 0, false
	}
	if err != nil {
		h.fail(w, r, http.StatusBadRequest, "failed reading request body", err)
		return policy.Ask{}, 0, false
	}
	a, id, wait, err := decodeWatch(body)
	if err == nil {
		err = h.speaksFor(r, a.Host)
	}
	if err != nil {
		h.fail(w, r, httpjson.Status(fault.Of(err)), "watch policies: "+err.Error(), nil)
		return a, 0, false
	}
	if a.Groups, err = h.sets.resolve(id, a.Groups); err != nil {
		h.fail(w, r, http.StatusPreconditionRequired, "watch policies: "+err.Error(), nil)
		return a, 0, false
	}
	return a, wait, extend(w, wait+h.o.Timeout)
}

// answer sends what a watch came to.
//
//go:noinline
func (h *internal) answer(w http.ResponseWriter, r *http.Request, u policy.Update, err error) {
	if err == nil {
		h.send(w, r, u)
		return
	}
	if r.Context().Err() != nil || errors.Is(err, context.DeadlineExceeded) {
		// We are stopping, or slow: another server, or the next one, knows more.
		err = fault.New(fault.Unavailable, err)
	}
	status := httpjson.Status(fault.Of(err))
	text := "watch policies: " + err.Error()
	if status >= http.StatusInternalServerError {
		text = "watch policies: " + fault.Of(err).Error() + ": see the log of the server"
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	h.fail(w, r, status, text, err)
}

// send writes an update. When all agents ask for everything at once, after a restart, long answers take turns with lists, and for
// each the time to read it starts now.
func (h *internal) send(w http.ResponseWriter, r *http.Request, u policy.Update) {
	s := shape{version: v1, tags: h.b.TagLength}
	if len(u.Set)+len(u.Gone) <= short {
		writeJSON(w, http.StatusOK, s.encodeUpdate(u))
		return
	}
	peer := peerOf(r)
	if !h.lists.enter(w, r, peer) {
		return
	}
	defer h.lists.exit(peer)
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTime))
	writeJSON(w, http.StatusOK, s.encodeUpdate(u))
}

// encodeUpdate returns the body of an answer to a watch.
func (s shape) encodeUpdate(u policy.Update) []byte {
	b := make([]byte, 0, (len(u.Set)+len(u.Gone))*ruleSize+192)
	b = append(b, `{"revision":"`...)
	b = append(b, u.Revision.String()...)
	b = append(b, `","full":`...)
	b = strconv.AppendBool(b, u.Full)
	b = append(b, `,"set":[`...)
	for i := range u.Set {
		if i > 0 {
			b = append(b, ',')
		}
		b = s.appendRule(b, &u.Set[i])
	}
	b = append(b, `],"gone":[`...)
	plain := shape{version: v1}
	for i, p := range u.Gone {
		if i > 0 {
			b = append(b, ',')
		}
		b = plain.appendRule(b, &policy.Rule{Policy: p})
	}
	b = append(b, `],"count":`...)
	b = strconv.AppendInt(b, int64(u.Count), 10)
	b = append(b, `,"sum":"`...)
	b = append(b, u.Sum.String()...)
	return append(b, `"}`...)
}
