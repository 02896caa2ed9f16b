package outbound_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/policyserver/outbound"
)

func TestTriesAreBounded(t *testing.T) {
	var calls atomic.Int32
	var answer atomic.Pointer[func(w http.ResponseWriter, r *http.Request)]
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		(*answer.Load())(w, r)
	}))
	defer s.Close()
	c := outbound.New(nil, 200*time.Millisecond, "somebody")
	defer c.Close()
	ask := func(f func(w http.ResponseWriter, r *http.Request)) (outbound.Answer, int32, error) {
		calls.Store(0)
		answer.Store(&f)
		a, err := c.Ask(t.Context(), func(ctx context.Context) (*http.Request, error) {
			return http.NewRequestWithContext(ctx, http.MethodGet, s.URL, http.NoBody)
		})
		return a, calls.Load(), err
	}
	status := func(code int) func(w http.ResponseWriter, r *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	for _, code := range []int{500, 503, 429} {
		if _, n, err := ask(status(code)); !errors.Is(err, fault.Unavailable) || n != 3 {
			t.Errorf("%d: %v after %d tries, want unavailable after 3", code, err, n)
		}
	}
	for _, code := range []int{200, 400, 404, 302} {
		if a, n, err := ask(status(code)); err != nil || a.Status != code || n != 1 {
			t.Errorf("%d: %+v, %v after %d tries, want it after one", code, a, err, n)
		}
	}
	start := time.Now()
	if _, n, err := ask(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }); !errors.Is(err, fault.Unavailable) || n != 3 || time.Since(start) > 10*time.Second {
		t.Errorf("silence: %v after %d tries and %v", err, n, time.Since(start))
	}
	second := func(w http.ResponseWriter, _ *http.Request) {
		if calls.Load() == 1 {
			w.WriteHeader(502)
		}
	}
	if a, n, err := ask(second); err != nil || a.Status != 200 || n != 2 {
		t.Errorf("once away: %+v, %v after %d tries", a, err, n)
	}
	endless := func(w http.ResponseWriter, _ *http.Request) {
		for b := make([]byte, 1<<20); ; {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	}
	if _, _, err := ask(endless); !errors.Is(err, fault.Unavailable) {
		t.Errorf("endless answer: %v, want unavailable", err)
	}
}

// TestConnectionsAreBounded has many ask at once, as those do who come with made-up tokens.
func TestConnectionsAreBounded(t *testing.T) {
	var now, most atomic.Int32
	release := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-release
		now.Add(-1)
	}))
	defer s.Close()
	c := outbound.New(nil, 20*time.Second, "somebody")
	defer c.Close()
	var wg sync.WaitGroup
	for range 300 {
		wg.Go(func() {
			_, err := c.Ask(t.Context(), func(ctx context.Context) (*http.Request, error) {
				return http.NewRequestWithContext(ctx, http.MethodGet, s.URL, http.NoBody)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	<-time.After(300 * time.Millisecond) // that all may come; with fewer the test proves less
	close(release)
	wg.Wait()
	if n := most.Load(); n > 64 {
		t.Errorf("%d requests were under way at once, want at most 64", n)
	}
}

func TestTrust(t *testing.T) {
	ca, err := pki.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	file := func(text string) string {
		f := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	if tc, err := outbound.Trust(false, "", file(" \n")); err != nil || tc.RootCAs != nil {
		t.Errorf("blank files: %v, want the system's authorities", err)
	}
	if tc, err := outbound.Trust(false, file(""), ca.CertFile()); err != nil || tc.RootCAs == nil {
		t.Errorf("one file: %v", err)
	}
	for _, f := range []string{file("x"), "/does/not/exist"} {
		if _, err := outbound.Trust(false, f); err == nil {
			t.Errorf("%s was taken", f)
		}
		if tc, err := outbound.Trust(true, f); err != nil || !tc.InsecureSkipVerify {
			t.Errorf("without verification %s was read: %v", f, err)
		}
	}
}
