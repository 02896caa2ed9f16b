package policyagent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/internal/reconcile"
)

const (
	fileRoom  = 8 << 20                // bytes of lines that wait for the disk; what comes when they are full is lost
	filePause = 100 * time.Millisecond // between writes
	fileCheck = time.Second            // between looks whether the file is still the one of that name
)

// flowFile appends lines to a file that others may rename or remove at any time. Whoever adds lines never waits for the disk.
type flowFile struct {
	path string
	log  *slog.Logger
	more chan struct{}

	mu    sync.Mutex
	lines []byte
	count uint64 // lines that wait
	lost  uint64 // lines that found no room or could not be written
	wrote uint64
	err   error

	f    *os.File // run's alone, as are the next
	torn bool     // the last line was not written whole
}

func newFlowFile(path string, log *slog.Logger) *flowFile {
	return &flowFile{path: path, log: log, more: make(chan struct{}, 1)}
}

// add takes a line, or counts it as lost.
func (f *flowFile) add(line []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.lines)+len(line) > fileRoom {
		f.lost++
		return
	}
	f.lines = append(f.lines, line...)
	f.count++
}

func (f *flowFile) wake() {
	select {
	case f.more <- struct{}{}:
	default:
	}
}

// run writes until ctx ends, and then what is left.
func (f *flowFile) run(ctx context.Context) {
	check := time.NewTicker(fileCheck)
	defer check.Stop()
	var spare []byte
	for alive := true; alive; {
		select {
		case <-ctx.Done():
			alive = false
		case <-f.more:
			alive = reconcile.Sleep(ctx, filePause)
		case <-check.C:
		}
		f.mu.Lock()
		lines, count := f.lines, f.count
		f.lines, f.count = spare[:0], 0
		f.mu.Unlock()
		f.write(lines, count)
		spare = lines
	}
	if f.f != nil {
		f.f.Close()
	}
}

// write appends lines to the file of that name. It is made if it is not there.
func (f *flowFile) write(lines []byte, count uint64) {
	err := f.reopen()
	if err == nil && len(lines) > 0 {
		if f.torn {
			_, err = f.f.Write([]byte("\n"))
		}
		if err == nil {
			var n int
			n, err = f.f.Write(lines)
			f.torn = n < len(lines) && (n > 0 || f.torn)
		}
	}
	f.mu.Lock()
	changed := (err == nil) != (f.err == nil)
	if f.err = err; err != nil {
		f.lost += count
	} else {
		f.wrote += count
	}
	f.mu.Unlock()
	switch {
	case !changed:
	case err != nil:
		f.log.Error("flow log cannot be written: its lines are lost meanwhile", "error", err)
	default:
		f.log.Info("flow log is written", "path", f.path)
	}
}

// reopen sees to it that the open file is the one of that name.
func (f *flowFile) reopen() error {
	now, err := os.Stat(f.path)
	if f.f != nil {
		if err == nil {
			if open, err := f.f.Stat(); err == nil && os.SameFile(open, now) {
				return nil
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		f.f.Close()
		f.f, f.torn = nil, false
	}
	if err == nil && !now.Mode().IsRegular() {
		return fmt.Errorf("open flow log %s: not a regular file", f.path) // what is no file may make us wait
	}
	if f.f, err = os.OpenFile(f.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644); err != nil {
		f.f = nil
		return err
	}
	return nil
}

// failure returns why lines are not written, nil if they are.
func (f *flowFile) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// figures returns how many lines were written, and how many were lost.
func (f *flowFile) figures() (wrote, lost uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.wrote, f.lost
}
