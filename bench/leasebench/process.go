package leasebench

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/bench/server"
	"code.cloudfoundry.org/silk/internal/sqldb"
)

// process is a silk-controller.
type process struct {
	*server.Process
	API, Health string // addresses
}

// start runs a controller with the overlay 10.0.0.0/8 over db and waits until it serves. more are further keys of its configuration.
func (b *run) start(ctx context.Context, db sqldb.Config, more map[string]any) (*process, error) {
	cfg := map[string]any{
		"listen_host": "127.0.0.1", "listen_port": 0, "health_check_port": 0, "debug_server_port": 0,
		"ca_cert_file": b.ca.CertFile(), "server_cert_file": b.cert, "server_key_file": b.key,
		"network": "10.0.0.0/8", "subnet_prefix_length": 24, "database": db,
	}
	for k, v := range more {
		cfg[k] = v
	}
	var p process
	var err error
	p.Process, err = server.Start(ctx, b.bin, b.dir, "-config", cfg, &p)
	return &p, err
}

var watching = regexp.MustCompile(`(?m)^silk_controller_requests_in_flight\{class="watch"\} ([0-9]+)`)

// awaitWatchers waits until n watches wait.
func (p *process) awaitWatchers(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for tick := time.NewTicker(100 * time.Millisecond); ; {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.Health+"/metrics", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return fmt.Errorf("wait for %d watchers: %w", n, err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return err
		}
		if m := watching.FindSubmatch(b); m != nil && string(m[1]) == strconv.Itoa(n) {
			tick.Stop()
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			return fmt.Errorf("wait for %d watchers: %w", n, ctx.Err())
		}
	}
}
