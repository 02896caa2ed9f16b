package policyagent

import (
	"testing"
	"time"

	"code.cloudfoundry.org/silk/policy"
)

// TestWhatIsHeldGoesInTime: a policy that is kept for a while though no list has it any more is enforced until its time is over and no longer, though
// nothing else changes.
func TestWhatIsHeldGoesInTime(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	web, api := w.attach("web"), w.attach("api")
	api.listen(8080)
	w.allow(r, tcpPolicy("web", "api", 8080))
	if !web.reaches(api, 8080) {
		t.Fatal("what is allowed does not pass")
	}
	r.mu.Lock()
	s := r.held.State()
	for _, rule := range s.Listed {
		s.Absent = append(s.Absent, policy.HeldRule{Rule: rule, Until: wall().Add(3 * time.Second)})
	}
	s.Listed = nil
	r.held = s.Restore(watchWait)
	r.version++
	r.mu.Unlock()
	r.enforcement.Kick()
	if status, text := r.force("/force-policy-poll-cycle"); status != 200 || !web.reaches(api, 8080) {
		t.Errorf("%d %s: what is held does not pass", status, text)
	}
	eventually(t, "what was held is closed", 20*time.Second, func() bool {
		c, err := web.dial(api, 8080)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.held.Absent(); n > 0 {
		t.Errorf("%d policies are still held", n)
	}
}
