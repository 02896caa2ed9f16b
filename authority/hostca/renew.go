package hostca

import (
	"context"
	"crypto/x509"
	"errors"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/authority/authorityhttp"
	"code.cloudfoundry.org/silk/fault"
)

// pass is one look at what is due. Whatever it does may fail: the next one finds the same due.
func (i *Issuer) pass(ctx context.Context) error {
	var err error
	asked := i.due(time.Now())
	if asked {
		err = i.renew(ctx)
	}
	if i.rootsDue() && !errors.Is(err, fault.Unavailable) { // a host without a lease is to know them too
		err = errors.Join(err, i.hear(ctx))
		if !asked && i.due(time.Now()) { // the root of the intermediate has gone
			err = errors.Join(err, i.renew(ctx))
		}
	}
	return errors.Join(err, i.save())
}

// due reports whether another intermediate is to be asked for.
func (i *Issuer) due(now time.Time) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.now == nil || i.wanted {
		return true
	}
	if i.now.TrustedBy(i.roots) != nil {
		return true
	}
	return timeFor(i.now.Certificate(), i.fresh, i.got, now)
}

// timeFor reports whether c, which this process has had since got, is to be replaced by now: at half of its life, a little before by a share that differs between
// certificates, so that hosts that came together do not ask together. The wall clock may be wrong: time that passed in this process counts as well; what was
// saved by a clock ahead of ours has an unknown age and is replaced; and what was just given is not replaced again because of a clock that is far ahead.
func timeFor(c *x509.Certificate, fresh bool, got, now time.Time) bool {
	life := c.NotAfter.Sub(c.NotBefore)
	share := time.Duration(c.SerialNumber.Bits()[0]%256) * (life / 20 / 256)
	half := authority.Renewal(c).Add(-share)
	had := now.Sub(got) // by the monotonic clock
	switch {
	case fresh && had < min(life/8, time.Hour):
		return false
	case had >= half.Sub(c.NotBefore):
		return true
	case now.Before(c.NotBefore):
		return !fresh
	}
	return !now.Before(half)
}

func (i *Issuer) rootsDue() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.heard.IsZero() || time.Since(i.heard) >= rootsEvery
}

// renew asks for an intermediate for a new key, and adopts it.
func (i *Issuer) renew(ctx context.Context) error {
	i.mu.Lock()
	i.begun++
	i.wanted = false // who wants one from here on may want what comes after it
	i.mu.Unlock()
	next, g, failed := i.question(ctx)
	err := failed
	if failed == nil {
		// The files come first: no leaf is shown that the containers of this host do not trust, or that a restart would lose the intermediate of.
		err = i.files.store(saved{i.cfg.Underlay, next, g.Roots})
		i.adopt(next, g.Roots)
		i.cfg.Log.Info("intermediate renewed", "expires", next.Certificate().NotAfter, "subnets", next.Constraints().Subnets, "serial", next.Certificate().SerialNumber.Text(16))
		if now := time.Now(); now.Before(next.Certificate().NotBefore) || now.After(next.Certificate().NotAfter) {
			i.cfg.Log.Warn("clock of this host differs from the controller's: others may refuse its certificates", "begins", next.Certificate().NotBefore, "now", now)
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.ended, i.err = i.begun, failed
	i.ending = time.Now()
	if i.away++; !errors.Is(failed, fault.Unavailable) {
		i.away = 0
	}
	if next == nil {
		i.wanted = true // until it succeeds
	} else {
		i.inVain = len(i.needed) > 0 && !next.Covers(i.needed...) || i.ending.After(next.Certificate().NotAfter)
		i.needed = nil
	}
	close(i.over)
	i.over = make(chan struct{})
	return err
}

func (i *Issuer) question(ctx context.Context) (*authority.Intermediate, authorityhttp.Grant, error) {
	key, err := authority.NewKey()
	if err != nil {
		return nil, authorityhttp.Grant{}, err
	}
	csr, err := authority.NewRequest(key)
	if err != nil {
		return nil, authorityhttp.Grant{}, err
	}
	g, err := i.cfg.Client.Intermediate(ctx, i.cfg.Underlay, csr)
	if err != nil {
		return nil, g, err
	}
	next, err := authority.NewIntermediate(g.Certificate, key)
	if err == nil {
		err = next.TrustedBy(g.Roots)
	}
	if err != nil {
		return nil, g, fault.Unavailablef("the controller's answer cannot be used: %v", err)
	}
	return next, g, nil
}

// hear asks which roots are trusted.
func (i *Issuer) hear(ctx context.Context) error {
	b, err := i.cfg.Client.Roots(ctx)
	if err != nil {
		return err
	}
	i.mu.Lock()
	now := i.now
	i.mu.Unlock()
	if !b.Equal(i.Roots()) {
		err = i.files.store(saved{i.cfg.Underlay, now, b})
	}
	i.adopt(now, b)
	return err
}

// adopt makes an intermediate and roots current.
func (i *Issuer) adopt(next *authority.Intermediate, roots authority.Bundle) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.heard = time.Now()
	if !roots.Equal(i.roots) {
		i.cfg.Log.Info("trusted roots changed", "roots", len(roots.Certificates()), "issuing", roots.Certificates()[0].Subject.String())
	} else if next == i.now {
		return
	}
	if next != i.now {
		i.now, i.got, i.fresh = next, time.Now(), true
	}
	i.roots = roots
	close(i.changed)
	i.changed = make(chan struct{})
}

// save writes what is not on the disk as it should be: a file that somebody removed, one that could not be written before.
func (i *Issuer) save() error {
	i.mu.Lock()
	s := saved{i.cfg.Underlay, i.now, i.roots}
	i.mu.Unlock()
	if s.roots.IsZero() {
		return nil
	}
	return i.files.store(s)
}
