package controller_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/controller"
	"code.cloudfoundry.org/silk/internal/sqldb"
)

// TestThePasswordIsNowhere fails to connect in several ways.
func TestThePasswordIsNowhere(t *testing.T) {
	c := issue(t)
	for _, engine := range []string{sqldb.Postgres, sqldb.MySQL} {
		for _, host := range []string{"127.0.0.1", "no such host", "/nonexistent"} {
			cfg := c.config(sqldb.Config{Type: engine, Host: host, Port: 1, User: "u", Password: "s3cret:@/p%w", Name: "n", Timeout: 1})
			var log bytes.Buffer
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			err := controller.Run(ctx, cfg, slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
			cancel()
			if err == nil || strings.Contains(err.Error()+log.String(), "s3cret") {
				t.Errorf("%s at %q: %v\n%s", engine, host, err, &log)
			}
		}
	}
}
