package policyhttp

import (
	"context"
	"errors"
	"net/http"
	"path"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/secgroup"
)

func (h *external) listGroups(w http.ResponseWriter, r *http.Request, c *call) {
	h.withGroups(w, r, c, nil, func(ctx context.Context, _ []byte) (any, error) {
		list, err := h.b.Groups.List(ctx)
		shown := make([]wireKept, len(list))
		for i, k := range list {
			shown[i] = showKept(k)
		}
		return map[string]any{"security_groups": shown}, err
	})
}

func (h *external) showGroup(w http.ResponseWriter, r *http.Request, c *call) {
	h.withGroups(w, r, c, nil, func(ctx context.Context, _ []byte) (any, error) {
		list, err := h.b.Groups.List(ctx)
		for _, k := range list {
			if k.GUID == path.Base(r.URL.Path) {
				return showKept(k), nil
			}
		}
		if err == nil {
			err = fault.NotFoundf("there is no security group with guid %.60q", path.Base(r.URL.Path))
		}
		return nil, err
	})
}

func (h *external) createGroup(w http.ResponseWriter, r *http.Request, c *call) {
	audit := "security group created"
	h.withGroups(w, r, c, &audit, func(ctx context.Context, body []byte) (any, error) {
		var in wireKept
		if err := decodeStrictly(body, &in); err != nil {
			return nil, err
		}
		var err error
		k := in.kept()
		if k.Rules, err = rulesText(in.Rules); err != nil {
			return nil, err
		}
		k, err = h.b.Groups.Create(ctx, k.Record)
		return showKept(k), err
	})
}

func (h *external) changeGroup(w http.ResponseWriter, r *http.Request, c *call) {
	audit := "security group changed"
	h.withGroups(w, r, c, &audit, func(ctx context.Context, body []byte) (any, error) {
		var in wireGroupChange
		if err := decodeStrictly(body, &in); err != nil {
			return nil, err
		}
		change := secgroup.Change{Name: in.Name, Bind: secgroup.Scope(in.Bind), Unbind: secgroup.Scope(in.Unbind)}
		if in.Rules != nil {
			text, err := rulesText(in.Rules)
			if err != nil {
				return nil, err
			}
			change.Rules = &text
		}
		k, err := h.b.Groups.Change(ctx, path.Base(r.URL.Path), change)
		return showKept(k), err
	})
}

func (h *external) deleteGroup(w http.ResponseWriter, r *http.Request, c *call) {
	audit := "security group deleted"
	h.withGroups(w, r, c, &audit, func(ctx context.Context, _ []byte) (any, error) {
		return struct{}{}, h.b.Groups.Delete(ctx, path.Base(r.URL.Path))
	})
}

// withGroups reads the body, takes a place, does what is asked and answers. What changes something has a line for the log; once admitted it
// is finished even if the caller leaves.
func (h *external) withGroups(w http.ResponseWriter, r *http.Request, c *call, audit *string, do func(ctx context.Context, body []byte) (any, error)) {
	body, release, ok, err := h.bodies.body(w, r, c.peer(), maxBody)
	defer release()
	switch {
	case !ok:
		return
	case err != nil:
		h.fail(w, r, http.StatusBadRequest, "failed reading request body", err)
		return
	case !h.places.enter(w, r, c.peer()):
		return
	}
	defer h.places.exit(c.peer())
	ctx := r.Context()
	if audit != nil {
		ctx = context.WithoutCancel(ctx)
	}
	ctx, cancel := context.WithTimeout(ctx, h.o.Timeout)
	defer cancel()
	out, err := do(ctx, body)
	if err != nil {
		h.failGroups(w, r, err)
		return
	}
	if audit != nil {
		args := []any{"user", c.caller.Name, "request_id", w.Header().Get(requestID), "guid", path.Base(r.URL.Path)}
		if k, ok := out.(wireKept); ok {
			args = append(args[:len(args)-2], "guid", k.GUID, "name", k.Name, "rules", string(k.Rules[:min(len(k.Rules), 4<<10)]), "staging_default", k.StagingDefault,
				"running_default", k.RunningDefault, "staging_spaces", k.StagingSpaces, "running_spaces", k.RunningSpaces, "policy_groups", k.Members)
		}
		h.log.Info(*audit, args...)
	}
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTime))
	httpjson.Write(w, http.StatusOK, out)
}

func (h *external) failGroups(w http.ResponseWriter, r *http.Request, err error) {
	kind := fault.Of(err)
	switch kind {
	case fault.Invalid, fault.NotFound, fault.Conflict, fault.Exhausted, fault.Denied:
		h.fail(w, r, httpjson.Status(kind), err.Error(), nil)
		return
	case fault.Unavailable:
	default:
		if !errors.Is(err, context.DeadlineExceeded) {
			h.fail(w, r, http.StatusInternalServerError, "security groups cannot be read or changed: see the log of the server", err)
			return
		}
	}
	w.Header().Set("Retry-After", "1")
	h.fail(w, r, http.StatusServiceUnavailable, "database is away", err)
}
