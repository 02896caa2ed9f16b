package policyagent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
)

const (
	cycleLimit     = 10 * time.Second // of a forced cycle
	containerLimit = 30 * time.Second // of a wait for one container's rules; callers have their own, shorter one
)

// forceHandler serves what the CNI plugins ask for, by any method.
func (a *agent) forceHandler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("/force-policy-poll-cycle", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Has("container") {
			a.forceContainer(w, r, endpoint.Key{Network: q.Get("network"), Container: q.Get("container"), Interface: q.Get("interface")})
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), cycleLimit)
		defer cancel()
		if err := a.forceCycle(ctx); err != nil {
			a.log.Error("forced cycle failed", "error", err)
			answer(w, http.StatusInternalServerError, "failed to force policy poll cycle: "+err.Error())
		}
	})
	m.HandleFunc("/force-asgs-for-container", a.ofGroups(a.forceGroups))
	m.HandleFunc("/force-orphaned-asgs-cleanup", a.ofGroups(func(w http.ResponseWriter, _ *http.Request, id string) {
		a.enforcement.Kick() // what is no container's goes with the next pass
		answer(w, http.StatusOK, "cleaned up ASGs for container "+id)
	}))
	return m
}

// ofGroups serves what the deployed wrapper plugin asks of security groups. 405 makes it apply those that the runtime gave for the container.
func (a *agent) ofGroups(serve func(w http.ResponseWriter, r *http.Request, container string)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		id := r.URL.Query().Get("container")
		switch {
		case !a.dynamic():
			answer(w, http.StatusMethodNotAllowed, "ASG syncing has been disabled administratively")
		case id == "":
			answer(w, http.StatusBadRequest, "no container specified")
		default:
			serve(w, r, id)
		}
	}
}

// forceGroups answers once what a container may reach is in the kernel. A container that is not known here has nothing to wait for.
func (a *agent) forceGroups(w http.ResponseWriter, r *http.Request, id string) {
	ctx, cancel := context.WithTimeout(r.Context(), containerLimit)
	defer cancel()
	if err := a.awaitContainer(ctx, endpoint.Key{Container: id}); err != nil && !errors.Is(err, fault.NotFound) {
		answer(w, http.StatusInternalServerError, fmt.Sprintf("failed to update asgs for container %s: %v", id, err))
		return
	}
	answer(w, http.StatusOK, "updated container "+id)
}

func answer(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	io.WriteString(w, text)
}

// forceContainer answers once a container's rules are in the kernel.
func (a *agent) forceContainer(w http.ResponseWriter, r *http.Request, k endpoint.Key) {
	if k.Container == "" {
		answer(w, http.StatusBadRequest, "no container specified")
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), containerLimit)
	defer cancel()
	err := a.awaitContainer(ctx, k)
	status := http.StatusOK
	switch kind := fault.Of(err); {
	case err == nil:
	case kind == fault.NotFound:
		status = http.StatusNotFound
	case kind == fault.Invalid, kind == fault.Conflict:
		status = http.StatusUnprocessableEntity
	default:
		status = http.StatusServiceUnavailable
	}
	if err != nil {
		answer(w, status, fmt.Sprintf("container %s is closed: %v", k.Container, err))
	}
}

// forceCycle runs a whole cycle: a pass that begins now, with the policies of all groups that the host has then. When policy-server does not
// answer, the containers' rules are what was known; that is no failure.
func (a *agent) forceCycle(ctx context.Context) error {
	a.mu.Lock()
	from, failures, unheard := a.now.begun+1, a.now.hearFailures, a.groups.fails
	a.mu.Unlock()
	a.enforcement.Kick()
	var err error
	var want uint64
	done := a.await(ctx, func() bool {
		if a.now.ended < from {
			return false
		}
		if err = a.now.passError; err != nil {
			return false
		}
		known := !slices.ContainsFunc(a.now.hosted.containers, func(c container) bool { return !a.groupsKnown(c) })
		if !known && a.groups.fails == unheard {
			return false
		}
		return a.inForce(a.question.groups, &want) || a.now.hearFailures > failures
	})
	if !done && err == nil && ctx.Err() != nil {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.now.ended < from {
			return fault.Unavailablef("the pass takes longer than %v", cycleLimit)
		}
	}
	return err
}

// inForce reports whether the policies of groups are known, and what was known when they first were seen to be is in the kernel; want remembers
// that between calls. While they are not known it sees to it that they are asked for. mu is held.
func (a *agent) inForce(groups []identity.Group, want *uint64) bool {
	for _, g := range groups {
		if g.Validate() == nil && !a.held.Knows(g) {
			nudge(a.nudged)
			return false
		}
	}
	if *want == 0 {
		*want = a.version + 1 // 0 is none
	}
	return a.now.version+1 >= *want && !a.now.enforcedAt.IsZero()
}

// awaitContainer waits until a container's rules are in the kernel. NotFound: there is no such container. Invalid or Conflict: it cannot have
// rules. Unavailable: they are not there, because policy-server does not answer or the kernel did not take them.
func (a *agent) awaitContainer(ctx context.Context, k endpoint.Key) error {
	a.mu.Lock()
	since := moment{a.now.begun + 1, a.now.hearFailures, a.groups.fails}
	a.mu.Unlock()
	if k.Network != "" && k.Interface != "" {
		r, err := a.seen.records.Lookup(k)
		if err != nil {
			return err
		}
		a.mu.Lock()
		c, ok := a.now.enforced[k]
		ready := ok && c.namespace == r.Namespace && c.is(r) && a.groupsKnown(c) && a.inForce([]identity.Group{c.group()}, new(uint64))
		a.mu.Unlock()
		if ready {
			return nil
		}
	}
	a.enforcement.Kick()
	var verdict error
	var want uint64
	done := a.await(ctx, func() bool {
		var final bool
		verdict, final = a.judge(k, since, &want)
		return final
	})
	if !done {
		return fault.New(fault.Unavailable, errors.Join(verdict, ctx.Err()))
	}
	return verdict
}

// is reports whether a container is what a record says.
func (c container) is(r endpoint.Record) bool {
	return len(c.endpoints) == len(r.Addresses) && len(c.endpoints) > 0 && c.endpoints[0].Address == r.Address() && string(c.endpoints[0].Group) == r.Group &&
		bytes.Equal(c.netOut, r.NetOut) && bytes.Equal(c.metadata, r.Metadata) // which say what it reaches outside
}

// moment is when somebody asked: the pass that begins after it, and how many attempts to hear had failed, of policies and of security groups.
type moment struct {
	pass             uint64
	policies, groups uint64
}

// judge says how a container stands after a pass that began when somebody asked, and whether it is worth no further wait. mu is held.
func (a *agent) judge(k endpoint.Key, since moment, want *uint64) (verdict error, final bool) {
	if a.now.ended < since.pass {
		return fault.Unavailablef("its rules are being made"), false
	}
	if a.now.passError != nil {
		return fault.Unavailablef("the kernel did not take the rules: %w", a.now.passError), false
	}
	c, there := a.now.hosted.find(k)
	if !there {
		return fault.NotFoundf("no container %q is attached to this host", k.Container), true
	}
	if e, ok := a.now.enforced[c.key]; !ok || !e.same(c) {
		if !a.known {
			return a.unheard(), a.now.hearFailures > since.policies
		}
		if !a.groupsKnown(c) {
			return a.unheardGroups(), a.groups.fails > since.groups
		}
		return a.refusal(c), true
	}
	if !a.groupsKnown(c) {
		return a.unheardGroups(), a.groups.fails > since.groups
	}
	if a.inForce([]identity.Group{c.group()}, want) {
		return nil, true
	}
	return a.unheard(), a.now.hearFailures > since.policies && !a.held.Knows(c.group())
}

// unheard says why policies are not known.
func (a *agent) unheard() error {
	if a.now.hearError != nil {
		return fault.Unavailablef("its policies are not known: policy-server: %w", a.now.hearError)
	}
	return fault.Unavailablef("its policies are not known yet")
}

// refusal says why a container has no rules.
func (a *agent) refusal(c container) error {
	for _, p := range a.now.problems {
		for _, e := range c.endpoints {
			if p.What == e.String() {
				return fault.Invalidf("%v", p.Err)
			}
		}
	}
	return fault.Invalidf("it cannot be enforced: see the log of vxlan-policy-agent")
}

// find returns a container; the network and the interface may be left out.
func (h hosted) find(k endpoint.Key) (container, bool) {
	for _, c := range h.containers {
		if c.key.Container == k.Container && (k.Interface == "" || c.key.Interface == "" || c.key.Interface == k.Interface) &&
			(k.Network == "" || c.key.Network == "" || c.key.Network == k.Network) {
			return c, true
		}
	}
	return container{}, false
}
