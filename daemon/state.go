package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"code.cloudfoundry.org/silk/internal/durable"
	"code.cloudfoundry.org/silk/lease"
)

// The files of the state directory. Each holds one JSON object and is replaced as a whole.
const (
	leaseFile = "lease.json"
	peersFile = "peers.json"
	lockFile  = "daemon.lock"
)

// maxState bounds a state file in bytes: 65,000 leases take about 6 MiB.
const maxState = 64 << 20

// State is the directory of what has to outlive a reboot: the last lease and the last peers. One daemon at a time
// writes it. The zero State is no directory: nothing is in it and nothing can be stored.
type State struct {
	dir    string
	frozen bool // it is read, never written
}

var (
	errNoState = errors.New("there is no state directory: see the log of the start")
	errFrozen  = errors.New("the state directory cannot be locked and written: see the log of the start")
)

// OpenState makes the directory if it is missing and removes what a killed process was still writing.
func OpenState(dir string) (State, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return State{}, fmt.Errorf("open state directory: %w", err)
	}
	if err := durable.Sweep(dir); err != nil {
		return State{}, fmt.Errorf("open state directory: %w", err)
	}
	return State{dir: dir}, nil
}

// savedLease is the content of leaseFile.
type savedLease struct {
	Underlay  netip.Addr   `json:"underlay_ip"`
	Subnet    netip.Prefix `json:"overlay_subnet"`
	Confirmed time.Time    `json:"confirmed,omitzero"` // last success by the wall clock
	Refused   bool         `json:"refused,omitempty"`
	Lost      bool         `json:"lost,omitempty"`
}

// Lease returns the last lease. Nothing saved is the zero Saved; a file that cannot be read, or makes no sense, is an error
// and the zero Saved.
func (s State) Lease() (Saved, error) {
	var f savedLease
	if ok, err := s.read(leaseFile, &f); err != nil || !ok {
		return Saved{}, err
	}
	l := lease.Lease{Underlay: f.Underlay, Subnet: f.Subnet, MAC: lease.MACOf(f.Subnet)}
	err := l.Validate()
	if err == nil && l.Underlay.Is4() != l.Base().Is4() {
		err = fmt.Errorf("%v is no lease", l)
	}
	if err != nil {
		return Saved{}, fmt.Errorf("read state %s: %w", leaseFile, err)
	}
	return Saved{Lease: l, Confirmed: f.Confirmed, Refused: f.Refused, Lost: f.Lost}, nil
}

// SetLease stores the last lease durably.
func (s State) SetLease(v Saved) error {
	return s.write(leaseFile, savedLease{v.Lease.Underlay, v.Lease.Subnet, v.Confirmed.UTC(), v.Refused, v.Lost})
}

// Peers returns the last peers. Nothing saved is the zero PeersState; a file that cannot be read is an error as well.
func (s State) Peers() (lease.PeersState, error) {
	var p lease.PeersState
	if _, err := s.read(peersFile, &p); err != nil {
		return lease.PeersState{}, err
	}
	return p, nil
}

// SetPeers stores the last peers durably.
func (s State) SetPeers(p lease.PeersState) error { return s.write(peersFile, p) }

// Remove deletes the files, and the directory if nothing else is in it. What is not there is no error.
func (s State) Remove() error {
	var errs []error
	for _, f := range []string{leaseFile, peersFile, lockFile} {
		if err := os.Remove(filepath.Join(s.dir, f)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if left, err := os.ReadDir(s.dir); err == nil && len(left) == 0 {
		errs = append(errs, os.Remove(s.dir))
	}
	return errors.Join(errs...)
}

// read decodes a file; ok is false when there is none.
func (s State) read(name string, v any) (ok bool, err error) {
	if s.dir == "" {
		return false, nil
	}
	path := filepath.Join(s.dir, name)
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err == nil && st.Size() > maxState:
		err = fmt.Errorf("%d bytes: expected at most %d", st.Size(), maxState)
	case err == nil:
		var b []byte
		if b, err = os.ReadFile(path); err == nil {
			err = json.Unmarshal(b, v)
		}
	}
	if err != nil {
		return false, fmt.Errorf("read state %s: %w", path, err)
	}
	return true, nil
}

// write replaces a file. One that has
// the content already stays.
func (s State) write(name string, v any) error {
	if s.dir == "" {
		return errNoState
	}
	if s.frozen {
		return errFrozen
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write state %s: %w", name, err)
	}
	b = append(b, '\n')
	if old, err := os.ReadFile(filepath.Join(s.dir, name)); err == nil && bytes.Equal(old, b) {
		return nil
	}
	if err := durable.Replace(filepath.Join(s.dir, name), 0o600, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	}); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}
