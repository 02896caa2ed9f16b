package policyserver

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policyhttp"
	"code.cloudfoundry.org/silk/revision"
)

// cleaner removes policies of apps that Cloud Controller no longer knows.
//
// It removes nothing when Cloud Controller cannot be asked, gives fewer apps than it says there are, or knows not one app of a whole
// question: then it is more likely that it does not show them than that they are gone. And it removes at most a share of all policies at once, and
// says what it left. Who is sure can override both on demand.
type cleaner struct {
	log     *slog.Logger
	metrics *figures
	share   float64
	parts   func(apps []string) [][]string // into what Cloud Controller is asked at once
	spaces  func(ctx context.Context, apps []string) (map[string]string, error)
	book    func() book
}

// book is what the cleaner asks of the store.
type book interface {
	List(ctx context.Context, f policy.Filter) ([]policy.Policy, error)
	Remove(ctx context.Context, ps []policy.Policy) (revision.Revision, error)
}

// run cleans up every interval, the first time after one, varied so that several servers do not move in step.
func (c *cleaner) run(ctx context.Context, interval time.Duration) error {
	for {
		t := time.NewTimer(interval - interval/10 + rand.N(interval/5+1))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		if _, err := c.clean(ctx, false); err != nil && ctx.Err() == nil {
			c.log.Warn("stale policies were not cleaned up", "error", err, "retry_in", interval)
		}
	}
}

const (
	cleanLimit  = policyhttp.CleanupTime - 10*time.Second // of one clean-up
	removeBatch = 500                                     // policies in one transaction
)

// clean removes stale policies and returns them.
func (c *cleaner) clean(ctx context.Context, force bool) ([]policy.Policy, error) {
	ctx, cancel := context.WithTimeout(ctx, cleanLimit)
	defer cancel()
	stale, err := c.find(ctx, force)
	if err == nil {
		err = c.remove(ctx, stale)
	}
	c.metrics.cleaned(len(stale), err)
	if err != nil {
		return nil, err
	}
	return stale, nil
}

func (c *cleaner) remove(ctx context.Context, stale []policy.Policy) error {
	if len(stale) > 0 {
		c.log.Info("deleting stale policies", "total_c2c_policies", len(stale), "first", stale[0].String())
	}
	for part := range slices.Chunk(stale, removeBatch) {
		if _, err := c.book().Remove(ctx, part); err != nil {
			return fmt.Errorf("delete stale policies: %w", err)
		}
		c.metrics.removed(len(part))
	}
	return nil
}

// find returns the policies of apps that do not exist, each once, unless a brake holds.
func (c *cleaner) find(ctx context.Context, force bool) ([]policy.Policy, error) {
	all, err := c.book().List(ctx, policy.Filter{})
	if err != nil {
		return nil, fmt.Errorf("list policies: %w", err)
	}
	apps := make([]string, 0, 2*len(all))
	for _, p := range all {
		apps = append(apps, string(p.Source), string(p.Destination))
	}
	slices.Sort(apps)
	known, err := c.known(ctx, slices.Compact(apps), force)
	if err != nil {
		return nil, err
	}
	var stale []policy.Policy
	for _, p := range all {
		if !known[string(p.Source)] || !known[string(p.Destination)] {
			stale = append(stale, p)
		}
	}
	most := max(1, int(c.share*float64(len(all))))
	if len(stale) > most && !force {
		c.log.Warn("many policies are stale: some are left for the next time", "stale", len(stale), "policies", len(all), "removed_now", most,
			"remedy", "to remove all: "+override)
		stale = stale[:most]
	}
	return stale, nil
}

// known returns which apps there are.
func (c *cleaner) known(ctx context.Context, apps []string, force bool) (map[string]bool, error) {
	known := make(map[string]bool, len(apps))
	for _, part := range c.parts(apps) {
		found, err := c.spaces(ctx, part)
		if err != nil {
			return nil, err
		}
		if len(found) == 0 && !force {
			return nil, fault.Unavailablef("nothing is removed, because cloud controller knows not one of %d apps, the first %.100q: if that is right: %s",
				len(part), part[0], override)
		}
		for app := range found {
			known[app] = true
		}
	}
	return known, nil
}

// override is what an admin can do who knows better than the brakes.
const override = "POST /networking/v1/external/policies/cleanup?force=true"
