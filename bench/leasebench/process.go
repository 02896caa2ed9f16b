package leasebench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
)

// process is a silk-controller, built from this repository, in a process of its own.
type process struct {
	cmd         *exec.Cmd
	api, health string
	logged      chan struct{} // closed when the process has closed its output
}

// build makes the program.
func build(ctx context.Context, dir string) (string, error) {
	bin := filepath.Join(dir, "silk-controller")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", bin, "code.cloudfoundry.org/silk/cmd/silk-controller")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build silk-controller: %w\n%s", err, out)
	}
	return bin, nil
}

// start runs bin with the overlay 10.0.0.0/8 over db and waits until it serves. more are further keys of its configuration.
func start(ctx context.Context, bin, dir string, ca *pki.CA, cert, key string, db sqldb.Config, more map[string]any) (*process, error) {
	cfg := map[string]any{
		"listen_host": "127.0.0.1", "listen_port": 0, "health_check_port": 0, "debug_server_port": 0,
		"ca_cert_file": ca.CertFile(), "server_cert_file": cert, "server_key_file": key,
		"network": "10.0.0.0/8", "subnet_prefix_length": 24, "database": db,
	}
	for k, v := range more {
		cfg[k] = v
	}
	b, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, "controller-*.json")
	if err != nil {
		return nil, err
	}
	if _, err := f.Write(b); err != nil {
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	p := &process{cmd: exec.CommandContext(ctx, bin, "-config", f.Name()), logged: make(chan struct{})}
	p.cmd.Stderr = os.Stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	serving := make(chan struct{})
	go p.read(out, serving)
	select {
	case <-serving:
		return p, nil
	case <-p.logged:
		return nil, errors.Join(errors.New("silk-controller ended before it served"), p.cmd.Wait())
	case <-ctx.Done():
		p.stop()
		return nil, ctx.Err()
	}
}

// read takes the addresses from the log and closes serving when it has them. The lines of every lease that follow it only
// drains: reading them closely would be a load of its own.
func (p *process) read(out io.Reader, serving chan<- struct{}) {
	defer close(p.logged)
	r := bufio.NewReaderSize(out, 64<<10)
	for {
		b, err := r.ReadSlice('\n')
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
		if bytes.Contains(b, []byte(`"level":"ERROR"`)) {
			os.Stderr.Write(b)
		}
		var line struct{ Msg, API, Health string }
		if p.api == "" && json.Unmarshal(b, &line) == nil && line.Msg == "serving" {
			p.api, p.health = line.API, line.Health
			close(serving)
		}
	}
}

func (p *process) stop() error {
	p.cmd.Process.Signal(os.Interrupt)
	<-p.logged
	return p.cmd.Wait()
}

// rss returns the resident memory in KiB.
func (p *process) rss() (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			return strconv.ParseFloat(f[1], 64)
		}
	}
	return 0, errors.New("no VmRSS of the controller")
}

var watching = regexp.MustCompile(`(?m)^silk_controller_requests_in_flight\{class="watch"\} ([0-9]+)`)

// awaitWatchers waits until n watches wait.
func (p *process) awaitWatchers(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for tick := time.NewTicker(100 * time.Millisecond); ; {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.health+"/metrics", nil)
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
