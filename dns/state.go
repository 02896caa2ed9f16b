package dns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/durable"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/registration"
)

// The files of the state directory.
const (
	namesFile      = "names"
	advertisedFile = "advertised.json"
	lockFile       = "dns.lock"
	brokenFile     = ".broken" // ends the name of what could not be read
)

// maxAdvertised is how much is read of the file of what is advertised, in bytes: 200,000 names of the longest kind, and more than a table takes of others.
const maxAdvertised = 64 << 20

// lockTimeout bounds the wait for the process before to let go of the directory.
const lockTimeout = 5 * time.Second

// state is what outlives the process. Without a directory, or with one that cannot be used, nothing does, and that is said.
type state struct {
	dir  string // "": none
	log  *slog.Logger
	lock *os.File

	mu       sync.Mutex
	unusable error            // why the directory cannot be used
	failed   map[string]error // of the last write of a file
	wrote    []byte           // advertisedFile, as written last; for its one writer
}

// openState makes the directory if it is missing and locks it. A server of names works without a directory as well, so there is no error.
func openState(ctx context.Context, dir string, log *slog.Logger) *state {
	s := &state{log: log, failed: map[string]error{}}
	if dir == "" {
		return s
	}
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	if s.unusable = s.open(ctx, dir); s.unusable != nil {
		log.Error("state directory cannot be used: names are lost at the next restart", "error", s.unusable)
	}
	return s
}

func (s *state) open(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("open state directory: %w", err)
	}
	f, err := kernel.LockPath(ctx, filepath.Join(dir, lockFile))
	if err != nil {
		return fmt.Errorf("open state directory: is another silk-dns running with it? %w", err)
	}
	if err := durable.Sweep(dir); err != nil {
		s.log.Warn("unfinished files stay in the state directory", "error", err)
	}
	s.lock, s.dir = f, dir
	return nil
}

func (s *state) close() {
	if s.lock != nil {
		s.lock.Close()
	}
}

// trouble returns why nothing is kept, nil when it is.
func (s *state) trouble() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	errs := []error{s.unusable}
	for _, err := range s.failed {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// names returns the table that was saved last, nil when there is none. A file that is no whole snapshot is put aside and said.
func (s *state) names(l registration.Limits, in registration.Ranges, clock time.Time) (*registration.Table, time.Time) {
	if s.dir == "" {
		return nil, time.Time{}
	}
	path := filepath.Join(s.dir, namesFile)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, time.Time{}
	}
	if err != nil {
		s.log.Error("saved names cannot be read", "error", err)
		return nil, time.Time{}
	}
	defer f.Close()
	t, taken, err := registration.Decode(f, l, in, clock)
	if err != nil {
		s.log.Error("saved names cannot be used", "error", err)
		if fault.Of(err) == fault.Invalid {
			s.putAside(path)
		}
		return nil, time.Time{}
	}
	return t, taken
}

// putAside keeps a file that cannot be used for people to look at.
func (s *state) putAside(path string) {
	err := os.Rename(path, path+brokenFile)
	s.log.Warn("file was put aside", "file", path+brokenFile, "error", err)
}

// saveNames writes a snapshot.
func (s *state) saveNames(write func(io.Writer) error) error {
	if s.dir == "" {
		return nil
	}
	return s.said(namesFile, durable.Replace(filepath.Join(s.dir, namesFile), 0o600, write))
}

// savedPair is a line of advertisedFile.
type savedPair struct {
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
}

// advertised returns what was told of this host's containers last. Of a file that is torn or too long it is what could be read, and an error as well.
func (s *state) advertised() ([]pair, error) {
	if s.dir == "" {
		return nil, nil
	}
	path := filepath.Join(s.dir, advertisedFile)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	list, err := readAdvertised(io.LimitReader(f, maxAdvertised))
	if err != nil {
		s.putAside(path)
	}
	return list, err
}

// readAdvertised reads what saveAdvertised writes, up to where that makes no sense.
func readAdvertised(r io.Reader) (list []pair, err error) {
	in := json.NewDecoder(r)
	if t, err := in.Token(); err != nil || t != json.Delim('[') {
		return nil, fault.Invalidf("%s: expected a list of at most %d bytes: %v", advertisedFile, maxAdvertised, err)
	}
	for in.More() {
		var v savedPair
		if err := in.Decode(&v); err != nil {
			return list, fault.Invalidf("%s: after %d names, at byte %d of at most %d: %w", advertisedFile, len(list), in.InputOffset(), maxAdvertised, err)
		}
		n, err := registration.ParseName(v.Name)
		if err != nil || !v.Address.IsValid() {
			return list, fault.Invalidf("%s has %.80q at %v: expected a name and an address", advertisedFile, v.Name, v.Address)
		}
		list = append(list, pair{n, v.Address.Unmap()})
	}
	_, err = in.Token()
	if err == nil {
		if _, err = in.Token(); err == io.EOF {
			return list, nil
		}
	}
	return list, fault.Invalidf("%s: after %d names, at byte %d of at most %d: expected the end: %v", advertisedFile, len(list), in.InputOffset(), maxAdvertised, err)
}

// saveAdvertised keeps what is told of this host's containers, if that is not on disk already.
func (s *state) saveAdvertised(list []pair) {
	if s.dir == "" {
		return
	}
	saved := []savedPair{}
	for _, p := range list {
		saved = append(saved, savedPair{string(p.name), p.address})
	}
	slices.SortFunc(saved, func(a, b savedPair) int {
		if n := strings.Compare(a.Name, b.Name); n != 0 {
			return n
		}
		return a.Address.Compare(b.Address)
	})
	b, err := json.Marshal(slices.Compact(saved))
	if err != nil || string(b) == string(s.wrote) {
		return
	}
	err = durable.Replace(filepath.Join(s.dir, advertisedFile), 0o600, func(w io.Writer) error { _, err := w.Write(b); return err })
	if s.said(advertisedFile, err) == nil {
		s.wrote = b
	}
}

// said tells once that a file cannot be written, and once that it can again, and returns err.
func (s *state) said(file string, err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil && s.failed[file] == nil:
		s.log.Error("state could not be stored: what changes now is lost at the next restart", "file", file, "error", err)
	case err == nil && s.failed[file] != nil:
		s.log.Info("state is stored again", "file", file)
	}
	s.failed[file] = err
	return err
}
