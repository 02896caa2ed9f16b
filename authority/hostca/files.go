package hostca

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/internal/durable"
)

const (
	stateFile = "intermediate.json"
	aside     = ".broken" // ends the name of a state file that made no sense
	maxState  = 1 << 20   // of a state file, in bytes
)

// files is the directory of what outlives a restart. Each file is replaced as a whole.
type files struct{ dir string }

// saved is what is in it.
type saved struct {
	underlay     netip.Addr
	intermediate *authority.Intermediate // nil: none
	roots        authority.Bundle
}

// savedJSON is the content of stateFile: all of it in one file, so that a key and its certificate are never of two kinds.
type savedJSON struct {
	Underlay    netip.Addr `json:"underlay_ip"`
	Key         string     `json:"key"`
	Certificate string     `json:"certificate"`
	Roots       string     `json:"roots"`
}

// openFiles makes the directories and removes what a killed process was still writing.
func openFiles(dir string) (files, error) {
	f := files{dir}
	roots := filepath.Dir(f.path(RootsFile))
	err := os.MkdirAll(dir, 0o700)
	if err == nil {
		err = os.MkdirAll(roots, 0o755)
	}
	if err == nil {
		err = readable(roots)
	}
	if err != nil {
		return f, fmt.Errorf("open state directory: %w", err)
	}
	for _, d := range []string{dir, roots} {
		durable.Sweep(d) // where that fails nothing can be written either, which is told
	}
	return f, nil
}

// readable makes a directory readable to containers, whatever umask there is. One that is stays as it is: its disk may have become read-only.
func readable(dir string) error {
	st, err := os.Stat(dir)
	if err != nil || st.Mode().Perm() == 0o755 {
		return err
	}
	return os.Chmod(dir, 0o755)
}

func (f files) path(name string) string { return filepath.Join(f.dir, name) }

// load reads the state. Nothing saved is the zero saved. A file that makes no sense is renamed, and an error; one that cannot be read stays, for that says nothing
// about it.
func (f files) load() (saved, error) {
	path := f.path(stateFile)
	b, err := readState(path)
	if errors.Is(err, fs.ErrNotExist) {
		return saved{}, nil
	}
	if err != nil {
		return saved{}, fmt.Errorf("read state: %w", err)
	}
	s, err := decode(b)
	if err != nil {
		return saved{}, errors.Join(fmt.Errorf("read state %s, which is put aside: %w", path, err), os.Rename(path, path+aside))
	}
	return s, nil
}

// readState returns the content of a file, of one that is too long so much that it shows. What is no plain file has none.
func readState(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.IsDir() {
		return nil, nil
	}
	return io.ReadAll(io.LimitReader(f, maxState+1))
}

// decode reads the content of a state file.
func decode(b []byte) (saved, error) {
	var j savedJSON
	if len(b) > maxState {
		return saved{}, fmt.Errorf("more than %d bytes", maxState)
	}
	if err := json.Unmarshal(b, &j); err != nil {
		return saved{}, err
	}
	roots, err := authority.ParseBundle([]byte(j.Roots))
	if err != nil {
		return saved{}, fmt.Errorf("roots: %w", err)
	}
	key, err := authority.ParseKey([]byte(j.Key))
	if err != nil {
		return saved{}, err
	}
	certs, err := authority.ParseCertificates([]byte(j.Certificate))
	if err != nil {
		return saved{}, err
	}
	i, err := authority.NewIntermediate(certs[0], key)
	return saved{j.Underlay, i, roots}, err
}

// store writes the roots and then the state, durably; what is there already stays.
func (f files) store(s saved) error {
	err := f.replace(RootsFile, s.roots.PEM(), 0o644)
	if s.intermediate == nil {
		return err
	}
	key, kerr := authority.EncodeKey(s.intermediate.Key())
	if kerr != nil {
		return errors.Join(err, kerr)
	}
	cert := authority.EncodeCertificates([]*x509.Certificate{s.intermediate.Certificate()})
	b, jerr := json.Marshal(savedJSON{s.underlay, string(key), string(cert), string(s.roots.PEM())})
	if jerr != nil {
		return errors.Join(err, jerr)
	}
	return errors.Join(err, f.replace(stateFile, append(b, '\n'), 0o600))
}

// replace writes a file, in a directory that it makes again if it has gone. One that has the content already stays.
func (f files) replace(name string, b []byte, mode os.FileMode) error {
	path := f.path(name)
	if st, err := os.Lstat(path); err == nil && st.Mode() == mode && st.Size() == int64(len(b)) {
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, b) {
			return nil
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return durable.Replace(path, mode, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
}
