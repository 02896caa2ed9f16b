package dns

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/registration"
)

// TestAWarmTableIsAskedWithoutWaiting: a question for a name that is not there asks whether the table is whole. While somebody works at it for long, all who
// answer would stand still, for others too.
func TestAWarmTableIsAskedWithoutWaiting(t *testing.T) {
	b := newBook(DefaultConfig(), slog.New(slog.DiscardHandler))
	b.restore(registration.NewTable(), time.Now())
	if !b.Warm() {
		t.Fatal("a table of just now is not warm")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	said := make(chan bool, 1)
	go func() { said <- b.Warm() }()
	select {
	case warm := <-said:
		if !warm {
			t.Error("it is not warm any more")
		}
	case <-time.After(20 * time.Second):
		t.Error("it waits for who works at the table")
	}
}

// TestManyWhoAskAreToldOnce: when NATS comes back every host of a fleet asks every other one, within seconds.
func TestManyWhoAskAreToldOnce(t *testing.T) {
	cfg := DefaultConfig()
	cfg.AdvertiseInterval = 120
	c := &crier{cfg: cfg, due: make(chan struct{}, 1), told: map[endpoint.Key]*advert{}}
	far := time.Now().Add(time.Hour)
	for i := range 1000 {
		c.told[endpoint.Key{Container: fmt.Sprint(i)}] = &advert{due: far}
	}
	began := time.Now()
	for range 300 {
		c.asked(intervalOf([]byte(`{"minimumRegisterIntervalInSeconds":60}`)))
	}
	soon := 0
	for _, a := range c.told {
		if a.due.Before(began) || a.due.After(time.Now().Add(time.Minute)) {
			t.Fatalf("due %v after the first asked, want within the minute that was asked for", a.due.Sub(began))
		}
		if a.due.Before(began.Add(15 * time.Second)) {
			soon++
		}
	}
	if soon > 500 {
		t.Errorf("%d of 1000 containers are due in the first quarter of the minute, want about 250", soon)
	}
	for _, bad := range []string{"", "{", `{"minimumRegisterIntervalInSeconds":0}`, `{"minimumRegisterIntervalInSeconds":-1}`, `{"minimumRegisterIntervalInSeconds":1e9}`} {
		if got := intervalOf([]byte(bad)); got != time.Minute {
			t.Errorf("a start that says %q asks for %v, want a minute", bad, got)
		}
	}
}

// TestSlowSourcesAreNotSilent: what a fleet tells of every two minutes is stale as soon as what it tells of every twenty seconds.
func TestSlowSourcesAreNotSilent(t *testing.T) {
	cfg := DefaultConfig()
	cfg.AdvertiseInterval = 120
	now := time.Unix(1_000_000, 0)
	f := registration.NewFreshness(cfg.terms(), now)
	f.Connected(now)
	seen := f.Clock(now) // of a name whose host dies; another one goes on
	end := now.Add(time.Hour)
	for at := now; at.Before(end); at = at.Add(time.Second) {
		if int(at.Sub(now).Seconds())%110 == 0 {
			f.Heard(at)
		}
		if limit, ok := f.Limit(at); ok && seen.Before(limit) {
			if age := at.Sub(now); age > (60+180+60)*time.Second {
				t.Errorf("stale after %v", age)
			}
			return
		}
	}
	t.Error("never stale")
}
