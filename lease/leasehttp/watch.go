package leasehttp

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/lease"
)

// watch answers when the leases differ from those at the revision asked from, or after the wait.
//
// Thousands of goroutines stand in its call of the registry's Watch. The stack of one shrinks to 8 KiB only while less than a
// quarter of 16 KiB is in use, of which net/http has more than a third: what is not needed during the wait is done in
// functions that have returned by then.
func (h *handler) watch(w http.ResponseWriter, r *http.Request) {
	ctx, cancel, since := h.prepare(w, r)
	if ctx == nil {
		return
	}
	defer cancel()
	u, err := h.reg.Watch(ctx, since)
	h.answer(w, r, since, u, err)
}

// prepare reads the query, makes the connection wait and returns a context that ends with the wait. If that is nil, the request is
// answered.
//
//go:noinline
func (h *handler) prepare(w http.ResponseWriter, r *http.Request) (context.Context, context.CancelFunc, lease.Revision) {
	q := r.URL.Query()
	since, err := lease.ParseRevision(q.Get("since"))
	wait, err2 := waitOf(q.Get("wait"))
	if err := errors.Join(err, err2); err != nil {
		h.fail(w, r, http.StatusBadRequest, "watch leases", err)
		return nil, nil, since
	}
	if since.IsZero() { // is answered at once
		wait = h.o.Timeout
	}
	// The listener's limits are for short requests: the read deadline would end the wait, the write deadline the answer.
	c := http.NewResponseController(w)
	end := time.Now().Add(wait + h.o.Timeout)
	err = errors.Join(c.SetReadDeadline(end), c.SetWriteDeadline(end.Add(30*time.Second)))
	if err != nil && !errors.Is(err, http.ErrNotSupported) { // the connection has gone
		return nil, nil, since
	}
	ctx, cancel := context.WithTimeout(r.Context(), wait)
	return ctx, cancel, since
}

// answer sends what a watch came to: u, or when the wait ended first, an update without changes.
//
//go:noinline
func (h *handler) answer(w http.ResponseWriter, r *http.Request, since lease.Revision, u lease.Update, err error) {
	if errors.Is(err, context.DeadlineExceeded) && r.Context().Err() == nil && !since.IsZero() {
		u, err = h.unchanged(r.Context(), since)
	}
	if err == nil {
		h.send(w, r, h.updates.encode(since, u), len(u.Set))
		return
	}
	if r.Context().Err() != nil || errors.Is(err, context.DeadlineExceeded) {
		// We are stopping, or slow: another controller, or the next one, knows more.
		err = fault.New(fault.Unavailable, err)
	}
	status := httpjson.Status(fault.Of(err))
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	h.fail(w, r, status, "watch leases", err)
}

// send writes an update. When all daemons ask for everything at once, after a new epoch or a restart, megabytes for each of them would
// fill the buffers of their connections: these answers take turns with lists, and for each the time to read it starts now.
func (h *handler) send(w http.ResponseWriter, r *http.Request, body []byte, leases int) {
	if leases <= short {
		writeJSON(w, body)
		return
	}
	httpjson.AdmitTo(h.lists, admission, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.NewResponseController(w).SetWriteDeadline(time.Now().Add(30 * time.Second))
		writeJSON(w, body)
	})).ServeHTTP(w, r)
}

// unchanged returns an update without changes, with the seal of since, unless there is news after all. It makes sure that the
// registry still knows: one whose database is away has no news either.
func (h *handler) unchanged(ctx context.Context, since lease.Revision) (lease.Update, error) {
	ctx, cancel := context.WithTimeout(ctx, h.o.Timeout)
	defer cancel()
	if _, err := h.reg.Leases(ctx); err != nil {
		return lease.Update{}, err
	}
	if u := h.seal.Load(); u != nil && u.Revision == since {
		return *u, nil
	}
	full, err := h.reg.Watch(ctx, lease.Revision{})
	if err != nil {
		return lease.Update{}, err
	}
	u := lease.Update{Revision: full.Revision, Count: full.Count, Sum: full.Sum}
	h.seal.Store(&u)
	switch {
	case u.Revision == since:
		return u, nil
	case u.Revision.Epoch == since.Epoch && u.Revision.Counter < since.Counter:
		return h.ahead(ctx, since)
	}
	return h.reg.Watch(ctx, since)
}

// ahead answers one that has seen a revision which is yet to come: another controller is ahead of us, for a second at most, or the database was
// restored to an earlier revision when nobody was there to notice. Then the history that it has seen is none, and it gets everything.
func (h *handler) ahead(ctx context.Context, since lease.Revision) (lease.Update, error) {
	soon, cancel := context.WithTimeout(ctx, lag)
	defer cancel()
	u, err := h.reg.Watch(soon, since)
	if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		return u, err
	}
	if _, err := h.reg.Leases(ctx); err != nil {
		return lease.Update{}, err
	}
	return h.reg.Watch(ctx, lease.Revision{})
}

// lag is more than controllers of one database are behind each other.
const lag = 2 * time.Second

// listCache holds the last list of leases that was sent and its body.
type listCache struct {
	last atomic.Pointer[encodedList]
	mu   sync.Mutex // held while encoding, so that many askers encode once
}

type encodedList struct {
	leases []lease.Lease
	body   []byte
}

// encode returns the body for ls.
func (c *listCache) encode(ls []lease.Lease) []byte {
	if e := c.last.Load(); e != nil && slices.Equal(e.leases, ls) {
		return e.body
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.last.Load(); e != nil && slices.Equal(e.leases, ls) {
		return e.body
	}
	e := &encodedList{slices.Clone(ls), encodeList(ls)}
	c.last.Store(e)
	return e.body
}

// updateCache holds the bodies of the last updates: a change is encoded once however many wait for it.
type updateCache struct {
	mu   sync.Mutex
	last [8]encodedUpdate // the newest first
}

type encodedUpdate struct {
	since, revision lease.Revision
	full            bool
	sum             string
	body            []byte
}

// encode returns the body for u, which answered since. Two updates between the same revisions with the same seal say the
// same; a full one says the same whoever asked.
func (c *updateCache) encode(since lease.Revision, u lease.Update) []byte {
	if u.Full {
		since = lease.Revision{}
	}
	if !u.Changes() {
		return encodeUpdate(u)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.last {
		if e.body != nil && e.since == since && e.revision == u.Revision && e.full == u.Full && e.sum == u.Sum {
			return e.body
		}
	}
	e := encodedUpdate{since, u.Revision, u.Full, u.Sum, encodeUpdate(u)}
	if u.Full { // at most one full body is kept
		for i := range c.last {
			if c.last[i].full {
				c.last[i] = encodedUpdate{}
			}
		}
	}
	copy(c.last[1:], c.last[:])
	c.last[0] = e
	return e.body
}
