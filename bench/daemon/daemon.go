// Package daemon measures silk-daemon as a process: its memory with 2,047 peers, how soon it has paths to all of them, and what
// an idle interval costs.
package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/bench"
)

const (
	peers   = 2047
	rounds  = 3
	objects = 4 // kernel objects of a peer: route, neighbour, forwarding entry, set element
	idle    = 10 * time.Second
)

// Run measures.
func Run(ctx context.Context, r *bench.Report) error {
	dir, err := os.MkdirTemp("", "silk-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "silk-daemon")
	build := exec.CommandContext(ctx, "go", "build", "-o", program, "code.cloudfoundry.org/silk/cmd/silk-daemon")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build silk-daemon: %w: %s", err, out)
	}
	var start, restart, high, alone, cpu []float64
	for i := range rounds {
		h, err := NewHost(ctx, Options{filepath.Join(dir, strconv.Itoa(i)), program, "100.64.0.0/10", 24, 1})
		if err != nil {
			return err
		}
		m, err := h.measure(ctx)
		h.Close()
		if err != nil {
			return err
		}
		alone, high = append(alone, m.alone), append(high, m.high)
		start, restart, cpu = append(start, m.start), append(restart, m.restart), append(cpu, m.cpu)
	}
	none := math.NaN()
	rss := bench.Median(high)
	r.Bar("daemon.peers.2047.resident", rss, "MiB", bench.Median(alone), "<= 32 MiB", rss <= 32)
	r.Add("daemon.peers.2047.start", bench.Median(start), "ms", none)
	r.Add("daemon.peers.2047.restart", bench.Median(restart), "ms", none)
	r.Add("daemon.peers.2047.idle_cpu", bench.Median(cpu), "ms/interval", none)
	return nil
}

// measures are the figures of one round.
type measures struct {
	alone, high    float64 // MiB: resident without peers, and the most with them
	start, restart float64 // ms from the start of the process to paths to all peers
	cpu            float64 // ms of CPU in an interval of 1 s without changes
}

func (h *Host) measure(ctx context.Context) (m measures, err error) {
	if err := h.Start(ctx); err != nil {
		return m, err
	}
	if err := h.Wait(ctx, 0); err != nil {
		return m, err
	}
	if m.alone, err = h.status("VmHWM"); err != nil {
		return m, err
	}
	h.stop()
	if err := h.fill(ctx, peers); err != nil {
		return m, err
	}
	for _, took := range []*float64{&m.start, &m.restart} {
		*took, err = bench.Millis(func() error {
			if err := h.Start(ctx); err != nil {
				return err
			}
			return h.Wait(ctx, peers)
		})
		if err != nil {
			return m, err
		}
		if took == &m.start {
			h.stop()
		}
	}
	before, err := h.CPU()
	if err != nil {
		return m, err
	}
	select {
	case <-ctx.Done():
		return m, ctx.Err()
	case <-time.After(idle):
	}
	after, err := h.CPU()
	if err != nil {
		return m, err
	}
	m.cpu = (after - before) / idle.Seconds()
	m.high, err = h.status("VmHWM")
	return m, err
}

// Wait returns when the daemon has paths to n peers.
func (h *Host) Wait(ctx context.Context, n int) error {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: h.dial}}
	want := fmt.Sprintf("silk_daemon_overlay_objects{kind=\"desired\"} %d\n", n*objects)
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:23954/metrics", nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err == nil {
			var b strings.Builder
			_, err := copyTo(&b, resp)
			if err == nil && strings.Contains(b.String(), want) && strings.Contains(b.String(), "silk_daemon_state{state=\"ready\"} 1") {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no paths to %d peers within 30 s: %s", n, h.log)
		case <-tick.C:
		}
	}
}

func (h *Host) dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	err = h.NS.Do(func() error {
		c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// status returns a size from /proc/PID/status in MiB.
func (h *Host) status(key string) (float64, error) { return bench.Memory(h.process.Pid, key) }

// CPU returns the CPU time of the process so far in ms.
func (h *Host) CPU() (float64, error) {
	total := 0.0
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", h.process.Pid))
	if err != nil {
		return 0, err
	}
	for _, t := range tasks {
		b, err := os.ReadFile(t)
		if err != nil {
			continue // the thread has ended
		}
		var run float64
		if _, err := fmt.Sscan(string(b), &run); err != nil {
			return 0, err
		}
		total += run
	}
	return total / 1e6, nil
}

// config writes the daemon's configuration.
func (h *Host) config(cert, key, ca string) error {
	b, err := json.Marshal(map[string]any{
		"underlay_ip": underlay, "overlay_network": h.Overlay, "subnet_prefix_length": h.Bits, "connectivity_server_url": "https://" + underlay + ":4103", "poll_interval": h.Interval,
		"ca_cert_file": ca, "client_cert_file": cert, "client_key_file": key, "state_dir": filepath.Join(h.Dir, "state"),
		"endpoint_dir": h.EndpointDir(), "resolv_conf": filepath.Join(h.Dir, "resolv.conf"),
	})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(h.Dir, "config.json"), b, 0o600)
}
