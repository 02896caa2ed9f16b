package policyagent

import (
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall/nft"
)

// TestTheTimeToTheKernelIsCounted: every change once, from when it was heard, also one that comes while another is on its way.
func TestTheTimeToTheKernelIsCounted(t *testing.T) {
	w := newWorld(t)
	r := w.start(w.policies())
	for _, m := range []*member{w.attach("web"), w.attach("api")} { // which is a change too: of groups
		if status, text := r.force("/force-policy-poll-cycle?container=" + m.key.Container); status != 200 {
			t.Fatalf("%d %s", status, text)
		}
	}
	count := func(name string) int {
		t.Helper()
		_, text := r.get(r.cfg.debugAddress(), "/metrics")
		m := regexp.MustCompile(`(?m)^silk_policy_agent_change_to_kernel_seconds_` + name + ` (\d+)$`).FindStringSubmatch(text)
		if m == nil {
			t.Fatalf("no %s in\n%s", name, text)
		}
		n, _ := strconv.Atoi(m[1])
		return n
	}
	for i := range 3 {
		before := count("count")
		w.allow(r, tcpPolicy("web", "api", uint16(8080+i)))
		if n := count("count"); n != before+1 {
			t.Errorf("change %d: counted %d times", i, n-before)
		}
	}
	if all, quick := count("count"), count(`bucket{le="10"}`); all != quick {
		t.Errorf("%d of %d took up to 10 s", quick, all)
	}
}

func TestAChangeDuringAPassIsTimedToo(t *testing.T) {
	w := newWorld(t)
	a, err := open(t.Context(), w.config(), w.ns, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	first, second := time.Now().Add(-2*time.Second), time.Now().Add(-time.Second)
	a.version, a.now.version, a.now.changedAt, a.now.changedLast = 2, 1, first, second
	a.noteEnforced(hosted{}, a.held.Revision(), first, nft.Changes{}, true, 0)
	if n := counted(t, a); n != "1" || !a.now.changedAt.Equal(second) {
		t.Errorf("after the pass for the first: %s counted, %v is waited for", n, a.now.changedAt)
	}
	a.now.version = 2
	a.noteEnforced(hosted{}, a.held.Revision(), second, nft.Changes{}, true, 0)
	if n := counted(t, a); n != "2" || !a.now.changedAt.IsZero() {
		t.Errorf("after the pass for the second: %s counted, %v is waited for", n, a.now.changedAt)
	}
}

// counted returns how many changes the metrics say were timed.
func counted(t *testing.T, a *agent) string {
	t.Helper()
	w := httptest.NewRecorder()
	a.metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	_, rest, _ := strings.Cut(w.Body.String(), "\nsilk_policy_agent_change_to_kernel_seconds_count ")
	n, _, _ := strings.Cut(rest, "\n")
	return n
}
