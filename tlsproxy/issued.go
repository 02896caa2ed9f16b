package tlsproxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/authority/authorityhttp"
	"code.cloudfoundry.org/silk/authority/hostca"
	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/registration"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

const (
	namesEvery = 2 * time.Second // between two questions for the names of containers, and attempts to issue
	namesLimit = time.Second     // of one
	leafLimit  = 5 * time.Second // of one leaf
	reissueGap = 10 * time.Millisecond

	lockFile    = "tls.lock"      // in the state directory
	lockTimeout = 5 * time.Second // for the process before to let go of it
)

// issuance has certificates that this host issues, and issues them anew when half of their life is over or the container's names change.
type issuance struct {
	issuer *hostca.Issuer
	names  *registrationhttp.Names // nil: records alone say how containers are called
	log    *slog.Logger
	loop   *reconcile.Loop

	mu      sync.Mutex
	records []endpoint.Record
	leaves  map[endpoint.Key]*leaf
	unnamed string // why the last question for names failed
}

// leaf is one container's certificate. What is in it does not change but under issuance.mu.
type leaf struct {
	record endpoint.Record
	called []string            // what silk-dns last said
	others []registration.Name // that it said of another group's container: of who had the address before
	made   *credential         // nil: not yet
	names  []string            // that made was asked for with
	renew  time.Time
	got    time.Time // when made was issued, by the clock that nobody sets
	first  time.Time // before which none of the host's intermediate can begin
	stale  bool      // the host's intermediate, or the roots, have changed since
	err    error
}

// openIssued makes the host's own authority the source of certificates.
func (p *proxy) openIssued(ctx context.Context) error {
	tc, err := service.Certificates{CA: p.cfg.CACertFile, Cert: p.cfg.ClientCertFile, Key: p.cfg.ClientKeyFile}.Client()
	if err != nil {
		return fmt.Errorf("create tls config: %w", err)
	}
	underlay, err := netip.ParseAddr(p.cfg.UnderlayIP)
	if err != nil {
		return fmt.Errorf("underlay_ip: %w", err)
	}
	if err := p.lockState(ctx); err != nil {
		return err
	}
	issuer, err := hostca.Open(hostca.Config{
		Dir: p.cfg.StateDir, Underlay: underlay, Client: authorityhttp.NewClient(p.cfg.ServerURL, tc, authorityhttp.ClientOptions{}), Log: p.log,
	})
	if err != nil {
		return err
	}
	i := &issuance{issuer: issuer, log: p.log, leaves: map[endpoint.Key]*leaf{}}
	if p.cfg.NamesURL != "" {
		port, err := p.cfg.namesPort()
		if err != nil {
			return fmt.Errorf("names_url: %w", err)
		}
		i.names = registrationhttp.NewLocalNames(port, namesLimit)
	}
	i.loop = &reconcile.Loop{Name: "certificates", Step: i.pass, Log: p.log, Resync: namesEvery, MinGap: reissueGap}
	p.certificates = i
	p.loops = append(p.loops, i.loop)
	p.tasks = append(p.tasks, service.Task{Name: "host-ca", Run: issuer.Run}, service.Task{Name: "authority-watch", Run: i.watch}, service.Task{Name: "certificates", Run: i.loop.Run})
	return nil
}

// lockState keeps a second silk-tls away from the state directory. On a disk that takes no lock file nothing can be written either.
func (p *proxy) lockState(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	p.state, err = kernel.LockPath(ctx, filepath.Join(p.cfg.StateDir, lockFile))
	if fault.Of(err) == fault.Unavailable {
		return fmt.Errorf("open state directory: is another silk-tls running with it? %w", err)
	}
	if err != nil {
		p.log.Warn("state directory cannot be locked: nothing keeps a second silk-tls away from it", "error", err)
	}
	return nil
}

// watch has all certificates issued anew when the host's intermediate or the roots change.
func (i *issuance) watch(ctx context.Context) error {
	for {
		changed := i.issuer.Changed()
		i.mu.Lock()
		for _, l := range i.leaves {
			l.stale = true
		}
		i.mu.Unlock()
		i.loop.Kick()
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// keep implements certificates.
func (i *issuance) keep(records []endpoint.Record) {
	i.mu.Lock()
	there := map[endpoint.Key]bool{}
	for _, r := range records {
		there[r.Key] = true
		l := i.leaves[r.Key]
		if l == nil || l.record.Namespace != r.Namespace || l.record.Group != r.Group || !slices.Equal(l.record.Addresses, r.Addresses) { // another container
			i.leaves[r.Key] = &leaf{record: r}
		} else {
			l.record = r
		}
	}
	for k := range i.leaves {
		if !there[k] {
			delete(i.leaves, k)
		}
	}
	i.records = records
	i.mu.Unlock()
	i.loop.Kick()
}

// pass issues what is due.
func (i *issuance) pass(ctx context.Context) error {
	i.mu.Lock()
	records := i.records
	i.mu.Unlock()
	i.hear(ctx, records)
	for _, r := range records {
		if ctx.Err() != nil {
			return nil
		}
		i.renew(ctx, r.Key)
	}
	return nil
}

// hear asks how containers are called. When nobody answers they are called as before: a certificate with fewer names helps nobody.
func (i *issuance) hear(ctx context.Context, records []endpoint.Record) {
	if i.names == nil {
		return
	}
	for part := range slices.Chunk(records, registrationhttp.MaxAddresses) {
		owners := make([]registrationhttp.Owner, 0, len(part))
		for _, r := range part {
			owners = append(owners, registrationhttp.Owner{Address: r.Address(), Group: r.Group})
		}
		names, others, err := i.names.OfOwners(ctx, owners)
		if ctx.Err() != nil {
			return
		}
		i.mu.Lock()
		text := ""
		if err != nil {
			text = err.Error()
		}
		said := text == i.unnamed
		i.unnamed = text
		for _, r := range part {
			if l := i.leaves[r.Key]; l != nil && err == nil {
				l.called = l.called[:0:0]
				for _, n := range names[r.Address()] {
					l.called = append(l.called, string(n))
				}
				if o := others[r.Address()]; !slices.Equal(o, l.others) {
					if l.others = o; len(o) > 0 {
						i.log.Info("names of another group are registered at a container's address: its certificate is without them", "endpoint", r.Key, "names", o)
					}
				}
			}
		}
		i.mu.Unlock()
		switch {
		case said:
		case err != nil:
			i.log.Warn("names of containers are not known: certificates keep those they have", "error", err)
		default:
			i.log.Info("names of containers are known")
		}
		if err != nil {
			return
		}
	}
}

// wanted returns the names of a container, sorted. mu is held.
func (l *leaf) wanted() []string {
	list := slices.Clone(l.called)
	if a := l.record.Advertise; a != nil {
		for _, n := range a.Names {
			n = strings.ToLower(strings.TrimSuffix(n, "."))
			list = append(list, n)
			if a.Index != nil {
				list = append(list, fmt.Sprintf("%d.%s", *a.Index, n))
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// due reports whether a certificate is to be issued now. mu is held.
func (l *leaf) due(names []string, now time.Time) bool {
	return l.made == nil || l.stale || !now.Before(l.renew) || !slices.Equal(names, l.names) || l.misdated(now)
}

// misdated reports whether the clock was wrong when the certificate was issued, and has been set since: the certificate has not begun, though another could
// have, or half of a life has passed in this process.
func (l *leaf) misdated(now time.Time) bool {
	begins := l.made.pair.Leaf.NotBefore
	return now.Before(begins) && begins.After(l.first) || now.Sub(l.got) >= authority.LeafLife/2
}

// renew issues an endpoint's certificate if it is due. What was issued before holds until there is another; a failure is for the status, and tried again.
func (i *issuance) renew(ctx context.Context, k endpoint.Key) {
	i.mu.Lock()
	l := i.leaves[k]
	if l == nil {
		i.mu.Unlock()
		return
	}
	names := l.wanted()
	due, r, told := l.due(names, time.Now()), l.record, l.err
	l.stale = l.stale && !due
	i.mu.Unlock()
	if !due {
		return
	}
	made, err := i.issue(ctx, r, names)
	i.mu.Lock()
	defer i.mu.Unlock()
	if l.err = err; err != nil {
		l.stale = true
		if told == nil || told.Error() != err.Error() {
			i.log.Warn("certificate could not be issued", "endpoint", k, "error", err, "earlier_one_shown", l.made != nil)
		}
		return
	}
	l.made, l.names, l.got = &credential{pair: made.TLS(), expires: made.Certificate.NotAfter}, names, time.Now()
	l.renew, l.first = authority.Renewal(made.Certificate), made.Chain()[1].NotBefore
}

// issue makes a certificate. It does not wait for the controller: other containers may be better off.
func (i *issuance) issue(ctx context.Context, r endpoint.Record, names []string) (*authority.Leaf, error) {
	s := authority.Spec{Names: names, Group: identity.Group(r.Group)}
	for _, a := range r.Addresses {
		s.Addresses = append(s.Addresses, a.Addr())
	}
	if !i.issuer.Need(s.Addresses...) {
		err := i.issuer.Status().Err
		if err == nil {
			err = fault.Unavailablef("the controller was asked for it")
		}
		return nil, fmt.Errorf("this host has no intermediate for %v yet: %w", s.Addresses, err)
	}
	ctx, cancel := context.WithTimeout(ctx, leafLimit)
	defer cancel()
	made, err := i.issuer.Leaf(ctx, s)
	if err != nil {
		return nil, err
	}
	attrs := []any{"endpoint", r.Key, "names", made.Certificate.DNSNames, "expires", made.Certificate.NotAfter, "renewed_at", authority.Renewal(made.Certificate)}
	if len(made.LeftOut) > 0 {
		i.log.Warn("certificate issued without names that the host may not sign for: see container_ca_domains of the controller", append(attrs, "left_out", made.LeftOut)...)
	} else {
		i.log.Info("certificate issued", attrs...)
	}
	return made, nil
}

// show implements certificates.
func (i *issuance) show(r endpoint.Record) (*credential, error) {
	made, err := i.inspect(r)
	if made != nil {
		return made, nil
	}
	return nil, err
}

// inspect implements certificates.
func (i *issuance) inspect(r endpoint.Record) (*credential, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	l := i.leaves[r.Key]
	if l == nil || l.made == nil && l.err == nil {
		return nil, errors.New("none has been issued yet")
	}
	return l.made, l.err
}

// trust implements certificates.
func (i *issuance) trust() (trust, error) {
	t := trust{i.issuer.Roots(), i.issuer.TrustDomain()}
	if t.roots.IsZero() || t.domain == "" {
		return trust{}, errors.New("the controller has not said yet whose certificates are trusted")
	}
	return t, nil
}
