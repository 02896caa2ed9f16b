package policyhttp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/secgroup"
)

// maxRecords is how many groups an answer to agents of the deployed kind holds at most.
const maxRecords = 5000

// securityGroups answers agents of the deployed kind, in the deployed shape. They send per_page, which the deployed server ignores.
func (h *internal) securityGroups(w http.ResponseWriter, r *http.Request) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		h.fail(w, r, http.StatusBadRequest, "query cannot be read", err)
		return
	}
	var numbers [2]int64
	for i, key := range []string{"from", "limit"} {
		v := q.Get(key)
		if v == "" {
			continue
		}
		if numbers[i], err = strconv.ParseInt(v, 10, 64); err != nil || numbers[i] < 0 {
			h.fail(w, r, http.StatusInternalServerError, fmt.Sprintf("invalid value for '%s' parameter", key), err)
			return
		}
	}
	limit := int(min(numbers[1], maxRecords))
	if n, err := strconv.Atoi(q.Get("per_page")); err == nil && n > 0 && limit == 0 {
		limit = min(n, maxRecords)
	}
	var spaces []string
	for s := range strings.SplitSeq(q.Get("space_guids"), ",") {
		if s != "" {
			spaces = append(spaces, s)
		}
	}
	peer := peerOf(r)
	if !h.lists.enter(w, r, peer) {
		return
	}
	defer h.lists.exit(peer)
	ctx, cancel := context.WithTimeout(r.Context(), h.o.Timeout)
	defer cancel()
	p, err := h.b.GroupPage(ctx, spaces, numbers[0], limit)
	if err != nil {
		h.fail(w, r, http.StatusInternalServerError, "database read failed", err)
		return
	}
	writeRecords(w, p)
}

// headerRevision tells of which revision a page of security groups is.
const headerRevision = "X-Silk-Revision"

// writeRecords sends a page, in chunks so that megabytes of rules never stand in memory twice.
func writeRecords(w http.ResponseWriter, p GroupPage) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set(headerRevision, p.Revision.String())
	b := append(make([]byte, 0, 4<<10), `{"next":`...)
	b = strconv.AppendInt(b, p.Next, 10)
	b = append(b, `,"security_groups":[`...)
	written := false
	for i := range p.Groups {
		if i > 0 {
			b = append(b, ',')
		}
		if b = appendRecord(b, &p.Groups[i], false); len(b) < chunk {
			continue
		}
		if _, err := w.Write(b); err != nil {
			return // the caller has gone
		}
		written, b = true, b[:0]
	}
	b = append(b, "]}"...)
	if !written {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	}
	w.Write(b)
}

// watchGroups answers when the security groups of a host differ from those it has, or after the wait. As in watch, what is not needed
// meanwhile is done in functions that have returned by then.
func (h *internal) watchGroups(w http.ResponseWriter, r *http.Request) {
	peer := peerOf(r)
	if !h.watchers.enter(w, r, peer) {
		return
	}
	defer h.watchers.exit(peer)
	a, wait, ok := h.prepareGroups(w, r)
	if !ok {
		return
	}
	u, err := h.b.WatchGroups(r.Context(), a, wait)
	h.answerGroups(w, r, u, err)
}

//go:noinline
func (h *internal) prepareGroups(w http.ResponseWriter, r *http.Request) (secgroup.Ask, time.Duration, bool) {
	body, release, ok, err := h.bodies.body(w, r, peerOf(r), maxWatch)
	defer release()
	if !ok {
		return secgroup.Ask{}, 0, false
	}
	if err != nil {
		h.fail(w, r, http.StatusBadRequest, "failed reading request body", err)
		return secgroup.Ask{}, 0, false
	}
	var in wireGroupWatch
	var a secgroup.Ask
	var wait time.Duration
	if err = json.Unmarshal(body, &in); err != nil {
		err = fault.Invalidf("body is not what was expected: %w", err)
	} else if a, err = in.ask(); err == nil {
		wait, err = waitFor(in.Wait)
	}
	if err == nil {
		err = h.speaksFor(r, a.Host)
	}
	if err != nil {
		h.fail(w, r, httpjson.Status(fault.Of(err)), "watch security groups: "+err.Error(), nil)
		return a, 0, false
	}
	return a, wait, extend(w, wait+h.o.Timeout)
}

//go:noinline
func (h *internal) answerGroups(w http.ResponseWriter, r *http.Request, u secgroup.Update, err error) {
	switch {
	case err == nil && !u.Full:
		writeJSON(w, http.StatusOK, encodeGroups(u))
	case err == nil:
		peer := peerOf(r)
		if !h.lists.enter(w, r, peer) { // when all agents ask for everything at once, after a restart, they take turns
			return
		}
		defer h.lists.exit(peer)
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTime))
		writeJSON(w, http.StatusOK, encodeGroups(u))
	default:
		if r.Context().Err() != nil || errors.Is(err, context.DeadlineExceeded) {
			err = fault.New(fault.Unavailable, err) // we are stopping, or slow: another server, or the next one, knows more
		}
		status := httpjson.Status(fault.Of(err))
		if status == http.StatusServiceUnavailable {
			w.Header().Set("Retry-After", "1")
		}
		h.fail(w, r, status, "watch security groups: "+fault.Of(err).Error()+": see the log of the server", err)
	}
}
