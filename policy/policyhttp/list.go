package policyhttp

import (
	"context"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// errNoCleaner is why nothing can be cleaned up without Cloud Controller.
var errNoCleaner = fault.Unavailablef("there is no cc_url in the configuration: nobody knows which policies are stale")

// filterOf reads what a list is asked for. As in the deployed server only the first occurrence of a key counts, and one that is there
// but empty selects nothing. A query that cannot be read is refused: without the part that cannot, it would select everything.
func filterOf(rawQuery string) (policy.Filter, error) {
	q, err := url.ParseQuery(rawQuery)
	if err != nil {
		return policy.Filter{}, err
	}
	return policy.Filter{Either: groupList(q, "id"), Sources: groupList(q, "source_id"), Destinations: groupList(q, "dest_id")}, nil
}

// groupList returns the groups of a query parameter, nil if it is not there.
func groupList(q url.Values, key string) []identity.Group {
	if !q.Has(key) {
		return nil
	}
	gs := []identity.Group{}
	for g := range strings.SplitSeq(q.Get(key), ",") {
		if g != "" {
			gs = append(gs, identity.Group(g))
		}
	}
	return gs
}

func (h *external) list(w http.ResponseWriter, r *http.Request, c *call) {
	f, err := filterOf(r.URL.RawQuery)
	if err != nil {
		h.fail(w, r, http.StatusBadRequest, "query cannot be read", err)
		return
	}
	if !h.places.enter(w, r, c.peer()) {
		return
	}
	defer h.places.exit(c.peer())
	ctx, cancel := context.WithTimeout(r.Context(), h.o.Timeout)
	defer cancel()
	rules, n, err := h.b.Rules(ctx, f)
	if err != nil {
		h.fail(w, r, http.StatusInternalServerError, "database read failed", err)
		return
	}
	if !c.caller.Admin() {
		if rules, n, err = h.readable(ctx, c.caller, rules, n); err != nil {
			h.fail(w, r, http.StatusInternalServerError, "filter policies failed", err)
			return
		}
	}
	writeRules(w, shape{version: c.version}, rules, n)
}

// readable returns those of n rules that are between groups that are both the caller's.
func (h *external) readable(ctx context.Context, c Caller, rules iter.Seq[policy.Rule], n int) (iter.Seq[policy.Rule], int, error) {
	ps := make([]policy.Policy, 0, n)
	for r := range rules {
		ps = append(ps, r.Policy)
	}
	mine, err := h.o.Access(ctx, c, groupsOf(ps))
	if err != nil {
		return nil, 0, err
	}
	var kept []policy.Rule
	for r := range rules {
		if mine[r.Source] && mine[r.Destination] {
			kept = append(kept, r)
		}
	}
	return slices.Values(kept), len(kept), nil
}

// CleanupTime is how long a clean-up on demand may take.
const CleanupTime = 5 * time.Minute

// cleanup answers in the shape of v1, whatever the version, as the deployed server does.
func (h *external) cleanup(w http.ResponseWriter, r *http.Request, c *call) {
	if h.o.Cleanup == nil {
		h.fail(w, r, http.StatusInternalServerError, "policies cleanup failed", errNoCleaner)
		return
	}
	if !extend(w, CleanupTime) {
		return
	}
	gone, err := h.o.Cleanup(r.Context(), r.URL.Query().Get("force") == "true")
	if err != nil {
		h.fail(w, r, http.StatusInternalServerError, "policies cleanup failed", err)
		return
	}
	rules := make([]policy.Rule, len(gone))
	for i, p := range gone {
		rules[i].Policy = p
	}
	h.log.Info("policies cleaned up on demand", "user", c.caller.Name, "policies", len(gone))
	writeRules(w, shape{version: v1}, slices.Values(rules), len(rules))
}
