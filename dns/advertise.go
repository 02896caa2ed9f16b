package dns

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/registration"
)

const (
	lookGap     = 50 * time.Millisecond // between looks at the containers that somebody asks for
	lookRetry   = 200 * time.Millisecond
	lookResync  = 2 * time.Second // between looks that nobody asks for: a record may change without its device
	spreadStart = time.Second     // over which everything is told at a new connection
	farewells   = 10_000          // unregistrations that wait for a connection
)

// crier tells of the host's own containers: it puts them into the table, and says them on NATS.
type crier struct {
	cfg     Config
	log     *slog.Logger
	book    *book
	ear     *ear
	records *endpoint.Dir
	past    *state // of this host's names, as an earlier process had told of them
	looking *reconcile.Loop
	due     chan struct{} // has a value when something may be due earlier than thought

	looked bool   // by the loop alone, as the next: once without an error
	bad    int    // records that could not be read last time
	noted  []pair // on disk

	mu   sync.Mutex
	told map[endpoint.Key]*advert
	gone []pair // that NATS has not been told of yet
}

// advert is what is said of one container.
type advert struct {
	registrations []registration.Registration
	payload       []byte
	due           time.Time // to be said
	fresh         time.Time // when it came; zero once that was said
}

// emission is a registration as emitters write it, with the keys of ours that registration.ParseMessage reads.
type emission struct {
	Host      string            `json:"host"`
	URIs      []string          `json:"uris"`
	App       string            `json:"app,omitempty"`
	Endpoint  string            `json:"private_instance_id,omitempty"`
	Index     string            `json:"private_instance_index,omitempty"`
	Port      uint16            `json:"port,omitempty"`
	Zone      string            `json:"availability_zone,omitempty"`
	Tags      map[string]string `json:"tags,omitempty"`
	UpdatedNS int64             `json:"endpoint_updated_at_ns,omitempty"`
}

func newCrier(cfg Config, b *book, e *ear, s *state, log *slog.Logger) (*crier, error) {
	c := &crier{cfg: cfg, log: log, book: b, ear: e, past: s, due: make(chan struct{}, 1), told: map[endpoint.Key]*advert{}}
	var err error
	if c.records, err = endpoint.Open(cfg.EndpointDir); err != nil {
		return nil, err
	}
	c.looking = &reconcile.Loop{Name: "containers", Step: c.look, Log: log, Resync: lookResync, MinGap: lookGap, Retry: lookRetry}
	return c, nil
}

// watch wakes the loop whenever a container's device comes or goes.
func (c *crier) watch(ctx context.Context) error {
	for failures := 1; ctx.Err() == nil; failures++ {
		err := endpoint.Watch(ctx, nil, c.looking.Kick)
		if ctx.Err() != nil {
			break
		}
		pause := reconcile.Backoff(time.Second, time.Minute, failures)
		c.log.Error("watch on container devices ended", "error", err, "retry_in", pause)
		reconcile.Sleep(ctx, pause)
	}
	return nil
}

// look makes what is told agree with the containers that there are: those with a record and a device, which goes with the container's namespace.
func (c *crier) look(context.Context) error {
	devices, err := endpoint.Containers(nil)
	if err != nil {
		return err
	}
	records, bad, err := c.records.List()
	if err != nil {
		return err
	}
	if len(bad) != c.bad {
		c.log.Warn("endpoint records cannot be read: what was told of them stays", "records", len(bad))
		c.bad = len(bad)
	}
	there := make(map[string]bool, len(devices))
	for _, d := range devices {
		there[d.Device] = true
	}
	wanted := map[endpoint.Key]*advert{}
	var all []registration.Registration
	for _, r := range records {
		if r.Advertise == nil || !there[r.Device] {
			continue
		}
		if a := c.advert(r); a != nil {
			wanted[r.Key] = a
			all = append(all, a.registrations...)
		}
	}
	c.takeBack()
	for _, b := range bad {
		if a := c.unreadable(b, there); a != nil {
			wanted[b.Key] = a
			all = append(all, a.registrations...)
		}
	}
	now := pairsOf(all)
	c.past.saveAdvertised(append(slices.Clip(c.noted), now...)) // first: who is killed here takes back more than was told, not less
	c.tell(wanted, all)
	c.mu.Lock()
	c.noted = append(now, c.gone...)
	c.mu.Unlock()
	c.past.saveAdvertised(c.noted)
	return nil
}

// takeBack does at the first look what the process before this one could not: it takes back the names of what went meanwhile.
func (c *crier) takeBack() {
	if c.looked {
		return
	}
	c.looked = true
	past, err := c.past.advertised()
	if err != nil {
		c.log.Error("what was advertised before is not all known: names of containers that went meanwhile may stay until they are stale", "known", len(past), "error", err)
	}
	c.noted = past
	c.book.adopt(past)
}

// unreadable returns what is told of a container whose record cannot be read, nil for nothing: a disk that fails for a moment is no reason to take
// names from a container that runs. Of what an earlier process told only names are known.
func (c *crier) unreadable(b endpoint.Bad, there map[string]bool) *advert {
	if len(b.Addresses) == 0 || !there[endpoint.Device(b.Addresses[0])] {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.told[b.Key]; a != nil {
		return a
	}
	a := &advert{}
	for _, p := range c.noted {
		if p.address == b.Addresses[0] {
			a.registrations = append(a.registrations, registration.Registration{Name: p.name, Address: p.address, Endpoint: b.Key.Container, Index: -1})
		}
	}
	if len(a.registrations) == 0 {
		return nil
	}
	a.payload, _ = json.Marshal(emission{ // has nothing that cannot be written
		Host: b.Addresses[0].String(), URIs: uris(a.registrations), Endpoint: b.Key.Container, Tags: map[string]string{"component": "silk-dns"},
	})
	return a
}

func pairsOf(list []registration.Registration) []pair {
	out := make([]pair, 0, len(list))
	for _, r := range list {
		out = append(out, pair{r.Name, r.Address})
	}
	return out
}

// tell replaces what is told.
func (c *crier) tell(wanted map[endpoint.Key]*advert, all []registration.Registration) {
	gone, errs := c.book.vouch(all)
	for _, err := range errs {
		c.book.reject("name of a container of this host was refused", err)
	}
	now := time.Now()
	c.mu.Lock()
	for k, a := range wanted {
		was := c.told[k]
		if was != nil && string(was.payload) == string(a.payload) {
			wanted[k] = was
			continue
		}
		a.due, a.fresh = now, now
		c.log.Info("container advertised", "container", k.Container, "names", uris(a.registrations))
	}
	for k := range c.told {
		if wanted[k] == nil {
			c.log.Info("container not advertised any more", "container", k.Container)
		}
	}
	c.told = wanted
	c.mu.Unlock()
	c.bid(gone)
	c.wake()
}

// bid has NATS told that pairs are no more.
func (c *crier) bid(gone []pair) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = append(c.gone, gone...)
	if n := len(c.gone) - farewells; n > 0 {
		c.gone = c.gone[n:] // they grow stale
	}
	if len(gone) > 0 {
		c.wake()
	}
}

// advert words what a record asks to be told; nil when that is nothing.
func (c *crier) advert(r endpoint.Record) *advert {
	a := &advert{}
	e := emission{
		Host: r.Address().String(), App: r.Group, Endpoint: r.Container, Port: r.Advertise.Port, Zone: c.cfg.Zone,
		Tags: map[string]string{"component": "silk-dns"},
	}
	index := -1
	if r.Advertise.Index != nil {
		index = *r.Advertise.Index
		e.Index = strconv.Itoa(index)
	}
	add := func(s string) {
		n, err := registration.ParseName(s)
		if err != nil {
			c.book.reject("name of a container of this host was refused", err)
			return
		}
		a.registrations = append(a.registrations, registration.Registration{
			Name: n, Address: r.Address(), Port: e.Port, Endpoint: e.Endpoint, Index: index, Zone: e.Zone, Group: e.App,
		})
	}
	for _, s := range r.Advertise.Names {
		add(s)
		if index >= 0 && !strings.HasPrefix(s, "*") {
			add(e.Index + "." + s) // as emitters do: others may not know of indexes
		}
	}
	if len(a.registrations) == 0 {
		return nil
	}
	e.URIs = uris(a.registrations)
	a.payload, _ = json.Marshal(e) // has nothing that cannot be written
	return a
}

func uris(list []registration.Registration) []string {
	var out []string
	for _, r := range list {
		out = append(out, string(r.Name))
	}
	return out
}

// connected has everything told again soon: who hears us may have forgotten it.
func (c *crier) connected() { c.again(min(spreadStart, seconds(c.cfg.AdvertiseInterval))) }

// asked has everything told again within the interval that somebody asks for, as emitters do.
func (c *crier) asked(interval time.Duration) { c.again(max(interval, time.Second)) }

// again has everything told within a time: what is due later, at a random part of it. What is due in that time anyway stays as it is, or each of the
// hundreds that ask when NATS comes back would have it told once more.
func (c *crier) again(within time.Duration) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.told {
		if a.due.After(now.Add(within)) {
			a.due = now.Add(rand.N(within))
		}
	}
	c.wake()
}

func (c *crier) wake() {
	select {
	case c.due <- struct{}{}:
	default:
	}
}

// run says what is due until ctx ends. At the end nothing is taken back: a restart is no reason to be forgotten.
func (c *crier) run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(time.Until(c.say()))
		select {
		case <-ctx.Done():
			return nil
		case <-c.due:
		case <-timer.C:
		}
	}
}

// say says what is due and returns when something is next.
func (c *crier) say() (next time.Time) {
	now, interval := time.Now(), seconds(c.cfg.AdvertiseInterval)
	next = now.Add(interval)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ear.standing.Load() {
		return next // connected comes when it does
	}
	if err := c.sayGone(); err != nil {
		return now.Add(lookRetry)
	}
	for _, a := range c.told {
		if !a.due.After(now) {
			if err := c.ear.publish(registration.SubjectRegister, a.message()); err != nil {
				return now.Add(lookRetry)
			}
			a.fresh = time.Time{}
			a.due = now.Add(interval - rand.N(interval/10+1))
		}
		if a.due.Before(next) {
			next = a.due
		}
	}
	return next
}

// sayGone says what is no more. mu is held.
func (c *crier) sayGone() error {
	byAddress := map[netip.Addr][]string{}
	for _, p := range c.gone {
		if !c.book.isOwn(p.name, p.address) {
			byAddress[p.address] = append(byAddress[p.address], string(p.name))
		}
	}
	var errs []error
	for a, names := range byAddress {
		for list := range slices.Chunk(names, 100) {
			b, _ := json.Marshal(emission{Host: a.String(), URIs: list}) // cannot fail
			errs = append(errs, c.ear.publish(registration.SubjectUnregister, b))
		}
	}
	err := errors.Join(errs...)
	if err == nil {
		c.gone = nil
	}
	return err
}

// message returns what is said of a container. Only the first time it says when that changed, as emitters do.
func (a *advert) message() []byte {
	if a.fresh.IsZero() {
		return a.payload
	}
	b := append([]byte(nil), a.payload[:len(a.payload)-1]...)
	b = append(b, `,"endpoint_updated_at_ns":`...)
	return append(strconv.AppendInt(b, a.fresh.UnixNano(), 10), '}')
}
