package httpjson_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
)

func serve(t *testing.T, h http.HandlerFunc) *httpjson.Client {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return &httpjson.Client{Base: s.URL, HTTP: s.Client()}
}

func TestKindSurvivesTheWire(t *testing.T) {
	for _, k := range []fault.Kind{fault.Internal, fault.Invalid, fault.NotFound, fault.Conflict, fault.Denied, fault.Unavailable} {
		c := serve(t, func(w http.ResponseWriter, r *http.Request) { httpjson.WriteError(w, httpjson.Status(k), `say "why"`) })
		err := c.Do(t.Context(), "GET", "/", nil, nil)
		if fault.Of(err) != k || !strings.Contains(err.Error(), `say "why"`) {
			t.Errorf("%v arrived as %v: %v", k, fault.Of(err), err)
		}
	}
}

func TestErrorBodyIsSpelledAsDeployed(t *testing.T) {
	w := httptest.NewRecorder()
	httpjson.WriteError(w, 500, `relation "subnets"`)
	if got, want := w.Body.String(), `{"error": "relation \"subnets\""}`; got != want || w.Code != 500 {
		t.Errorf("answer %d %s, want 500 %s", w.Code, got, want)
	}
}

func TestUnreachableIsUnavailable(t *testing.T) {
	c := &httpjson.Client{Base: "http://127.0.0.1:1", HTTP: &http.Client{Timeout: time.Second}}
	if err := c.Do(t.Context(), "GET", "/", nil, nil); !errors.Is(err, fault.Unavailable) {
		t.Errorf("%v, want unavailable", err)
	}
}

func TestLongAnswerIsRefused(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte(strings.Repeat(" ", 100) + "{}")) })
	c.Limit = 50
	if err := c.Do(t.Context(), "GET", "/", nil, &struct{}{}); err == nil {
		t.Error("an answer over the limit was accepted")
	}
}

func TestAdmitAnswers503WhenFull(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	h := httpjson.Admit(1, time.Millisecond, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		entered <- struct{}{}
		<-leave
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	}()
	<-entered
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if w.Code != 503 || w.Header().Get("Retry-After") == "" {
		t.Errorf("answer %d with Retry-After %q, want 503 with one", w.Code, w.Header().Get("Retry-After"))
	}
	close(leave)
	<-done
}

func FuzzErrorBody(f *testing.F) {
	f.Add([]byte(`{"error": "x"}`), 500)
	f.Add([]byte("\xff<html>"), 404)
	f.Fuzz(func(t *testing.T, body []byte, status int) {
		if status < 300 || status > 599 {
			t.Skip()
		}
		c := &httpjson.Client{Base: "http://x", HTTP: &http.Client{Transport: answer{body, status}}}
		if err := c.Do(t.Context(), "PUT", "/", nil, nil); err == nil {
			t.Fatal("no error")
		}
	})
}

type answer struct {
	body   []byte
	status int
}

func (a answer) RoundTrip(*http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	w.WriteHeader(a.status)
	w.Write(a.body)
	r := w.Result()
	r.Header.Del("Location")
	return r, nil
}
