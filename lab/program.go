package lab

import (
	"context"
	"log/slog"
	"sync"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// program is a process that is to be there always: adopted if it is, started if not, started again when it dies.
type program struct {
	dir, role string
	log       *slog.Logger
	start     func() (*process, error)
	quit      chan struct{} // closed by stop

	mu      sync.Mutex
	current *process
	starts  int // by this supervisor
	err     error
	stopped bool
}

func newProgram(dir, role string, log *slog.Logger, start func() (*process, error)) *program {
	return &program{dir: dir, role: role, log: log, start: start, quit: make(chan struct{})}
}

// The pauses between starts of a program that dies. One that lived for steady has its first pause again.
const (
	firstPause = 100 * time.Millisecond
	longPause  = 5 * time.Second
	steady     = 10 * time.Second
)

// run keeps the program running until ctx ends, which leaves it running, or until stop, which does not.
func (p *program) run(ctx context.Context) {
	for deaths := 0; ; {
		begun := time.Now()
		proc, err := p.obtain()
		if proc != nil {
			if proc.await(ctx) != nil && ctx.Err() != nil {
				return
			}
			p.forget()
		}
		if time.Since(begun) > steady {
			deaths = 0
		}
		pause := min(firstPause<<min(deaths, 10), longPause)
		deaths++
		select {
		case <-ctx.Done():
			return
		case <-p.quit:
			return
		default:
		}
		p.log.Warn("program ended", "program", p.role, "error", err, "restart_in", pause)
		select {
		case <-ctx.Done():
			return
		case <-p.quit:
			return
		case <-time.After(pause):
		}
	}
}

// obtain finds or starts the process and notes it. A stopped program gives none.
func (p *program) obtain() (*process, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil, nil
	}
	proc, err := find(p.dir, p.role)
	if proc == nil && err == nil {
		if proc, err = p.start(); err == nil {
			p.starts++
		}
	}
	p.current, p.err = proc, err
	return proc, err
}

// forget lets go of the process, which has ended.
func (p *program) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.current.close()
	p.current = nil
}

// signal sends sig to the process. fault.Unavailable when it does not run at the moment.
func (p *program) signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current == nil {
		return fault.Unavailablef("%s does not run at the moment", p.role)
	}
	return p.current.kill(sig)
}

// stop kills the process and lets run return. It may be called once.
func (p *program) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
	close(p.quit)
	if p.current != nil {
		p.current.kill(syscall.SIGKILL)
	}
}

// status returns how the program is.
func (p *program) status() Program {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := Program{Name: p.role, Starts: p.starts}
	if p.current != nil {
		st.PID = p.current.pid
	}
	if p.err != nil {
		st.Error = p.err.Error()
	}
	return st
}
