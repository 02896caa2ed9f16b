package policybench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// process is a policy-server, built from this repository, in a process of its own.
type process struct {
	cmd                *exec.Cmd
	external, internal string
	logged             chan struct{} // closed when the process has closed its output
}

func build(ctx context.Context, bin string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", bin, "code.cloudfoundry.org/silk/cmd/policy-server")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build policy-server: %w\n%s", err, out)
	}
	return nil
}

// start runs a policy-server and waits until it serves.
func (s *setup) start(ctx context.Context) (*process, error) {
	b, err := json.Marshal(map[string]any{
		"listen_host": "127.0.0.1", "listen_port": 0, "internal_listen_port": 0, "health_check_port": 0, "debug_server_port": 0, "enable_tls": true,
		"ca_cert_file": s.CA, "server_cert_file": s.Cert, "server_key_file": s.Key, "internal_clients": []string{"localhost"},
		"token_file": s.Tokens, "database": json.RawMessage(s.Database),
	})
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(s.Dir, "policy-server-*.json")
	if err != nil {
		return nil, err
	}
	if _, err = f.Write(b); err == nil {
		err = f.Close()
	}
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.CommandContext(ctx, s.Bin, "-config-file", f.Name()), logged: make(chan struct{})}
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
		return nil, errors.Join(errors.New("policy-server ended before it served"), p.cmd.Wait())
	}
}

// read takes the addresses from the log and closes serving when it has them. The lines that follow it only drains: reading them
// closely would be a load of its own.
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
		var line struct{ Msg, External, Internal string }
		if p.external == "" && json.Unmarshal(b, &line) == nil && line.Msg == "serving" {
			p.external, p.internal = line.External, line.Internal
			close(serving)
		}
	}
}

func (p *process) stop() error {
	p.cmd.Process.Signal(os.Interrupt)
	<-p.logged
	return p.cmd.Wait()
}

// rss returns the resident memory in MiB.
func (p *process) rss() (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kib, err := strconv.ParseFloat(f[1], 64)
			return kib / 1024, err
		}
	}
	return 0, errors.New("no VmRSS of the policy-server")
}
