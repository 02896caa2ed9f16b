package service_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/service"
)

var discard = slog.New(slog.DiscardHandler)

func recorder(name string, events chan<- string) service.Task {
	ready := make(chan struct{})
	return service.Task{Name: name, Ready: ready, Run: func(ctx context.Context) error {
		events <- "start " + name
		close(ready)
		<-ctx.Done()
		events <- "stop " + name
		return nil
	}}
}

func TestTasksStopInReverseOrder(t *testing.T) {
	events := make(chan string, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- service.Run(ctx, discard, recorder("a", events), recorder("b", events))
	}()
	got := []string{<-events, <-events}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	got = append(got, <-events, <-events)
	if want := []string{"start a", "start b", "stop b", "stop a"}; !slices.Equal(got, want) {
		t.Errorf("events %q, want %q", got, want)
	}
}

func TestAFailingTaskEndsTheProgram(t *testing.T) {
	events := make(chan string, 10)
	boom := errors.New("boom")
	err := service.Run(t.Context(), discard, recorder("a", events), service.Task{Name: "b", Run: func(context.Context) error { return boom }})
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "b: ") {
		t.Errorf("%v, want the failure with the task's name", err)
	}
	if err := service.Run(t.Context(), discard, service.Task{Name: "c", Run: func(context.Context) error { return nil }}); err == nil {
		t.Error("a task that stops by itself is no error")
	}
}

func TestHTTPStopsWhileALongPollWaits(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan struct{})
	h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(waiting)
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- service.Run(ctx, discard, service.HTTP("api", ln, nil, h, service.DefaultLimits, discard))
	}()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		if resp, err := http.Get("http://" + ln.Addr().String()); err == nil {
			resp.Body.Close()
		}
	}()
	<-waiting
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	<-answered
}

func TestLogLevelCanBeSetAndProbed(t *testing.T) {
	v := new(slog.LevelVar)
	s := httptest.NewServer(service.Debug(v))
	defer s.Close()
	for _, c := range []struct {
		body string
		want slog.Level
	}{{"debug", slog.LevelDebug}, {"", slog.LevelDebug}, {"nonsense", slog.LevelDebug}, {"e", slog.LevelError}, {"1", slog.LevelInfo}} {
		resp, err := http.Post(s.URL+"/log-level", "", strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 || len(b) != 0 || v.Level() != c.want {
			t.Errorf("%q: status %d, body %q, level %v, want 200, nothing, %v", c.body, resp.StatusCode, b, v.Level(), c.want)
		}
	}
	resp, err := http.Post(s.URL+"/mutex-profile-fraction", "", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 400 {
		t.Errorf("bad number: status %d, want 400", resp.StatusCode)
	}
}

func TestSlowHeaderIsCutOff(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	lim := service.DefaultLimits
	lim.Header = 20 * time.Millisecond
	go func() {
		done <- service.Run(ctx, discard, service.HTTP("api", ln, nil, http.NotFoundHandler(), lim, discard))
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.Write([]byte("GET / HTTP/1.1\r\n"))
	if b, err := io.ReadAll(c); err != nil || strings.Contains(string(b), "200") {
		t.Errorf("connection with half a header: %q, %v, want it closed", b, err)
	}
	cancel()
	<-done
}

// TestAPanicIsTold: the caller only sees that the connection ends.
func TestAPanicIsTold(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	h := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("out of order") })
	go func() { done <- service.Run(ctx, log, service.HTTP("api", ln, nil, h, service.DefaultLimits, log)) }()
	if resp, err := http.Get("http://" + ln.Addr().String()); err == nil {
		resp.Body.Close()
		t.Errorf("answer %d, want none", resp.StatusCode)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if text := out.String(); !strings.Contains(text, "level=ERROR") || !strings.Contains(text, "out of order") || !strings.Contains(text, "service_test.go") {
		t.Errorf("the log lacks the panic and its place:\n%s", text)
	}
}
