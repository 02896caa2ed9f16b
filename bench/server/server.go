// Package server has what the benchmarks of servers share: one of our programs, built from this repository, in a process of its own, and pgbench as
// what PostgreSQL commits when nothing stands before it.
package server

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
	"path/filepath"

	"code.cloudfoundry.org/silk/bench"
)

// Process is a running server.
type Process struct {
	name   string
	cmd    *exec.Cmd
	logged chan struct{} // closed when the process has closed its output
}

// Build makes the program of cmd/NAME in dir and returns its path.
func Build(ctx context.Context, dir, name string) (string, error) {
	bin := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-o", bin, "code.cloudfoundry.org/silk/cmd/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", name, err, out)
	}
	return bin, nil
}

// Start runs bin with cfg, written as JSON to a file in dir, after the flag, and waits until it serves. The line of its log that says so is read into
// where, which has fields for the addresses.
func Start(ctx context.Context, bin, dir, flag string, cfg map[string]any, where any) (*Process, error) {
	p := &Process{name: filepath.Base(bin), logged: make(chan struct{})}
	b, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(dir, p.name+"-*.json")
	if err != nil {
		return nil, err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	p.cmd = exec.CommandContext(ctx, bin, flag, f.Name())
	p.cmd.Stderr = os.Stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	serving := make(chan error, 1)
	go p.read(out, where, serving)
	select {
	case err := <-serving:
		if err != nil {
			return nil, errors.Join(err, p.Stop())
		}
		return p, nil
	case <-p.logged:
		return nil, errors.Join(fmt.Errorf("%s ended before it served", p.name), p.cmd.Wait())
	}
}

// read takes the addresses from the log. The lines that follow it only drains: reading them closely would be a load of its own.
func (p *Process) read(out io.Reader, where any, serving chan<- error) {
	defer close(p.logged)
	r := bufio.NewReaderSize(out, 64<<10)
	for found := false; ; {
		b, err := r.ReadSlice('\n')
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
		if bytes.Contains(b, []byte(`"level":"ERROR"`)) {
			os.Stderr.Write(b)
		}
		var line struct{ Msg string }
		if !found && json.Unmarshal(b, &line) == nil && line.Msg == "serving" {
			found = true
			serving <- json.Unmarshal(b, where)
		}
	}
}

// Stop interrupts the process and waits for its end.
func (p *Process) Stop() error {
	p.cmd.Process.Signal(os.Interrupt)
	<-p.logged
	return p.cmd.Wait()
}

// RSS returns the resident memory in KiB.
func (p *Process) RSS() (float64, error) {
	mib, err := bench.Memory(p.cmd.Process.Pid, "VmRSS")
	return mib * 1024, err
}
