package controller

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http/httptest"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/lease/leasesql"
)

// TestAnUnhealthyDatabaseIsLoggedOnce asks for health every so often while the database is away.
func TestAnUnhealthyDatabaseIsLoggedOnce(t *testing.T) {
	var buf bytes.Buffer
	var err error
	m := newFigures(func() *leasesql.Store { return nil })
	h := m.serve(func(context.Context) error { return err }, slog.New(slog.NewTextHandler(&buf, nil)))
	get := func(want int) {
		t.Helper()
		w := httptest.NewRecorder()
		if h.ServeHTTP(w, httptest.NewRequest("GET", "/health", nil)); w.Code != want {
			t.Errorf("health is %d %s, want %d", w.Code, w.Body, want)
		}
	}
	get(200)
	err = errors.New("the reason")
	for range 50 {
		get(500)
	}
	err = nil
	get(200)
	if lines := strings.Count(buf.String(), "\n"); lines != 2 || !strings.Contains(buf.String(), "the reason") {
		t.Errorf("the outage left %d lines, want one for its begin and one for its end:\n%s", lines, &buf)
	}
}
