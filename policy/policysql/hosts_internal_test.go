package policysql

import (
	"fmt"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// TestMoreHostsThanCanBeKept has somebody report under more names than there is room for: another host is still told its policies, nothing counts as in force
// everywhere, and the room is for those who report.
func TestMoreHostsThanCanBeKept(t *testing.T) {
	s := &Store{cfg: Config{Lease: time.Hour}.withDefaults(), feed: newFeed(), queue: nil}
	s.feed.reset(empty(), nil, 1, time.Now())
	set := s.feed.join([]identity.Group{"a"})
	for i := range maxHosts {
		s.feed.report(policy.Ask{Host: fmt.Sprintf("h%d", i)}, set, time.Hour)
	}
	if _, err := s.WatchFor(t.Context(), policy.Ask{Host: "honest", Groups: []identity.Group{"a"}}, 0); err != nil {
		t.Errorf("a host more is not told its policies: %v", err)
	}
	if sum := s.feed.summary(time.Hour, maxCounter, nil); sum.reporting != maxHosts || time.Since(sum.deployed) > time.Minute {
		t.Errorf("%d hosts report, and it is not known that one cannot be counted (%v)", sum.reporting, sum.deployed)
	}
	s.feed.hosts.hosts["h7"].at = time.Now().Add(-2 * time.Hour)
	s.feed.hosts.swept = time.Time{}
	if _, err := s.WatchFor(t.Context(), policy.Ask{Host: "honest", Groups: []identity.Group{"a"}}, 0); err != nil || s.feed.hosts.hosts["honest"] == nil || s.feed.hosts.hosts["h7"] != nil {
		t.Errorf("a host that reports no more keeps the place of one that does: %v", err)
	}
}
