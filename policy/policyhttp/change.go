package policyhttp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// verb is one of the two ways to change policies, with the deployed server's words for what goes wrong.
type verb struct {
	done, unread, failed string
	deletes              bool
}

var (
	creates = verb{done: "policies created", unread: "failed reading request body", failed: "database create failed"}
	deletes = verb{done: "policies deleted", unread: "invalid request body", failed: "database delete failed", deletes: true}
)

func (h *external) create(w http.ResponseWriter, r *http.Request, c *call) {
	h.change(w, r, c, &creates)
}

func (h *external) delete(w http.ResponseWriter, r *http.Request, c *call) {
	h.change(w, r, c, &deletes)
}

// change reads the body before it asks for a place, so that a client that sends slowly takes none, and gives the place back before it
// waits for force.
func (h *external) change(w http.ResponseWriter, r *http.Request, c *call, v *verb) {
	wait, err := waitOf(r)
	if err != nil {
		h.fail(w, r, http.StatusBadRequest, err.Error(), nil)
		return
	}
	at, ps, ok := h.read(w, r, c, v)
	switch {
	case !ok:
	case wait > 0:
		h.await(w, r, c, at, ps, wait)
	default:
		writeJSON(w, http.StatusOK, []byte("{}"))
	}
}

// read makes the change that a body asks for, or answers why not.
func (h *external) read(w http.ResponseWriter, r *http.Request, c *call, v *verb) (at revision.Revision, ps []policy.Policy, ok bool) {
	body, release, ok, err := h.bodies.body(w, r, c.peer(), maxBody)
	defer release()
	switch {
	case !ok:
		return at, nil, false
	case err != nil:
		h.fail(w, r, http.StatusBadRequest, v.unread, err)
		return at, nil, false
	case !h.places.enter(w, r, c.peer()):
		return at, nil, false
	}
	defer h.places.exit(c.peer())
	if ps, err = decodePolicies(body, c.version); err != nil {
		h.fail(w, r, http.StatusBadRequest, err.Error(), nil)
		return at, nil, false
	}
	at, ok = h.apply(w, r, c, v, ps)
	return at, ps, ok
}

// apply judges and makes a change, or answers why not. One that has been admitted is finished even if the caller leaves.
func (h *external) apply(w http.ResponseWriter, r *http.Request, c *call, v *verb, ps []policy.Policy) (at revision.Revision, ok bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), h.o.Timeout)
	defer cancel()
	quota := 0
	if !c.caller.Admin() {
		quota = h.o.MaxPolicies
		allowed, err := h.mayChange(ctx, c.caller, v, ps)
		if err != nil {
			h.fail(w, r, http.StatusInternalServerError, "check access failed", err)
			return at, false
		}
		if !allowed {
			h.fail(w, r, http.StatusForbidden, "one or more applications cannot be found or accessed", nil)
			return at, false
		}
	}
	var err error
	if v.deletes {
		at, err = h.b.Remove(ctx, ps)
	} else {
		at, err = h.b.Create(ctx, ps, quota)
	}
	switch {
	case err == nil:
		h.audit(r, c, v, ps, at)
		return at, true
	case errors.Is(err, ErrQuota):
		h.fail(w, r, http.StatusForbidden, "policy quota exceeded", nil)
	case errors.Is(err, fault.Exhausted), errors.Is(err, fault.Conflict): // no tag is left, or a group has one of another kind
		h.fail(w, r, http.StatusConflict, "policies cannot be created: "+err.Error(), nil)
	case errors.Is(err, fault.Invalid):
		h.fail(w, r, http.StatusBadRequest, err.Error(), nil)
	default:
		h.fail(w, r, http.StatusInternalServerError, v.failed, err)
	}
	return at, false
}

// mayChange reports whether a caller who is no admin may make a change. To create a policy one must be at home at both its ends; to end it at
// either is enough, so that who has lost the one can still close the other.
func (h *external) mayChange(ctx context.Context, c Caller, v *verb, ps []policy.Policy) (bool, error) {
	mine, err := h.o.Access(ctx, c, groupsOf(ps))
	if err != nil {
		return false, err
	}
	for _, p := range ps {
		if s, d := mine[p.Source], mine[p.Destination]; !s && !d || !v.deletes && (!s || !d) {
			return false, nil
		}
	}
	return true, nil
}

// groupsOf returns the groups of policies, sorted, each once.
func groupsOf(ps []policy.Policy) []identity.Group {
	gs := make([]identity.Group, 0, 2*len(ps))
	for _, p := range ps {
		gs = append(gs, p.Source, p.Destination)
	}
	slices.Sort(gs)
	return slices.Compact(gs)
}

// audit logs who changed what, in lines of bounded length.
func (h *external) audit(r *http.Request, c *call, v *verb, ps []policy.Policy, at revision.Revision) {
	for part := range slices.Chunk(ps, 100) {
		text := make([]string, len(part))
		for i, p := range part {
			text[i] = p.String()
		}
		h.log.LogAttrs(r.Context(), slog.LevelInfo, v.done, slog.String("user", c.caller.Name), slog.String("subject", c.caller.Subject),
			slog.Any("policies", text), slog.String("revision", at.String()), slog.String("remote", r.RemoteAddr))
	}
}

// The bounds of waiting for force.
const (
	defaultForce = 30 * time.Second
	maxForce     = 5 * time.Minute
)

// waitOf returns how long the caller wants to wait until a change is in force, 0 for not at all.
func waitOf(r *http.Request) (time.Duration, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return 0, errors.New("query cannot be read")
	}
	switch wait := q.Get("wait"); wait {
	case "":
		return 0, nil
	case "in-force":
	default:
		return 0, fmt.Errorf("wait=%.40s: expected wait=in-force", wait)
	}
	text := q.Get("timeout")
	if text == "" {
		return defaultForce, nil
	}
	d, err := time.ParseDuration(text)
	if n, nerr := strconv.ParseUint(text, 10, 16); nerr == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("timeout=%.40s: expected a time such as 30s, at most %v", text, maxForce)
	}
	return min(d, maxForce), nil
}

// wireForce is the answer of a change that was waited for. docs/api/policies.md explains its members.
type wireForce struct {
	InForce   bool              `json:"in_force"`
	Revision  revision.Revision `json:"revision"`
	Known     int               `json:"known"`
	Reporting int               `json:"reporting"`
	Unknown   int               `json:"unknown"`
	Lagging   []string          `json:"lagging"`
	Behind    int               `json:"behind"`
	OldAgents bool              `json:"old_agents"`
}

// await answers when a revision is in force everywhere, or 202 after the wait.
func (h *external) await(w http.ResponseWriter, r *http.Request, c *call, at revision.Revision, ps []policy.Policy, wait time.Duration) {
	if !h.waiting.enter(w, r, c.peer()) {
		return
	}
	defer h.waiting.exit(c.peer())
	if !extend(w, wait+h.o.Timeout) {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), wait+h.o.Timeout)
	defer cancel()
	f, err := h.b.Force(ctx, at, groupsOf(ps), wait)
	if err != nil {
		h.fail(w, r, http.StatusInternalServerError, "the change is made, but whether it is in force cannot be found out", err)
		return
	}
	status := http.StatusOK
	if !f.InForce {
		status = http.StatusAccepted
	}
	if f.Lagging == nil {
		f.Lagging = []string{}
	}
	httpjson.Write(w, status, wireForce{f.InForce, at, f.Known, f.Reporting, f.Unknown, f.Lagging, f.Behind, f.OldAgents})
}

// extend gives a request more time than the listener's limits, which are for short ones. It returns false when the connection has gone.
func extend(w http.ResponseWriter, more time.Duration) bool {
	c := http.NewResponseController(w)
	end := time.Now().Add(more)
	err := errors.Join(c.SetReadDeadline(end), c.SetWriteDeadline(end.Add(answerTime)))
	return err == nil || errors.Is(err, http.ErrNotSupported)
}

// answerTime is how long a peer may take to read an answer that had to be waited for.
const answerTime = 30 * time.Second
