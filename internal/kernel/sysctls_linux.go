package kernel

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Sysctls sets values below /proc/sys and remembers, in one file each, what they were before the first change, so that
// Restore can leave the machine as it was. Several programs may share a directory.
type Sysctls struct{ Dir string }

// sysctlRecord is a file's content.
type sysctlRecord struct {
	Old  string `json:"old"`
	Ours string `json:"ours"`
}

// Set gives key ("net/ipv4/ip_forward"), in the calling thread's namespace, the value. Nothing is written when it has it
// already; a change is recorded before it is made.
func (s *Sysctls) Set(key, value string) error {
	old, err := Sysctl(key)
	if err != nil {
		return fmt.Errorf("read sysctl %s: %w", key, err)
	}
	if old == value {
		return nil
	}
	if err := s.record(key, sysctlRecord{old, value}); err != nil {
		return fmt.Errorf("record sysctl %s: %w", key, err)
	}
	if err := SetSysctl(key, value); err != nil {
		return fmt.Errorf("set sysctl %s to %s: %w", key, value, err)
	}
	return nil
}

func (s *Sysctls) file(key string) string {
	return filepath.Join(s.Dir, strings.ReplaceAll(key, "/", ":")) // device names may contain a dot, no key a colon
}

// record keeps the oldest value known. A later value of ours replaces the earlier one.
func (s *Sysctls) record(key string, r sysctlRecord) error {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return err
	}
	known, err := s.read(key)
	if err == nil {
		r.Old = known.Old
		if r == known {
			return nil
		}
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(s.Dir, ".tmp-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if known != (sysctlRecord{}) {
		return os.Rename(f.Name(), s.file(key))
	}
	// A link fails when another process was first: then what it found is older than what we saw.
	if err := os.Link(f.Name(), s.file(key)); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func (s *Sysctls) read(key string) (sysctlRecord, error) {
	b, err := os.ReadFile(s.file(key))
	if err != nil {
		return sysctlRecord{}, err
	}
	var r sysctlRecord
	if err := json.Unmarshal(b, &r); err != nil {
		return sysctlRecord{}, fmt.Errorf("read %s: %w", s.file(key), err)
	}
	return r, nil
}

// Restore gives every recorded sysctl, in the calling thread's namespace, its old value if ours still stands, and
// forgets it. It goes on after failures and returns them joined.
func (s *Sysctls) Restore() error {
	files, err := os.ReadDir(s.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		if strings.HasPrefix(f.Name(), ".tmp-") {
			errs = append(errs, os.Remove(filepath.Join(s.Dir, f.Name())))
			continue
		}
		errs = append(errs, s.restore(strings.ReplaceAll(f.Name(), ":", "/")))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.Remove(s.Dir)
}

func (s *Sysctls) restore(key string) error {
	r, err := s.read(key)
	if err != nil {
		return err
	}
	now, err := Sysctl(key)
	if err == nil && now == r.Ours {
		err = SetSysctl(key, r.Old)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a device that is gone took its sysctls along
		return fmt.Errorf("restore sysctl %s: %w", key, err)
	}
	return os.Remove(s.file(key))
}
