package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// maxStore bounds the deployed store in bytes.
const maxStore = 16 << 20

// storeAddresses returns the addresses that the deployed silk-cni's store says are in use, in order: one JSON object of
// {"handle", "ip", "metadata"} by handle, with the file itself as the lock. An empty file, one that does not exist and no path
// at all are an empty store. It is only read: unlike the deployed daemon we do not create it.
func storeAddresses(ctx context.Context, path string) ([]netip.Addr, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	defer f.Close()
	if err := lockToRead(ctx, f); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxStore+1))
	if err != nil {
		return nil, fmt.Errorf("read store %s: %w", path, err)
	}
	addrs, err := parseStore(b)
	if err != nil {
		return nil, fmt.Errorf("read store %s: %w", path, err)
	}
	return addrs, nil
}

// lockToRead takes the lock on f. It asks again and again: a wait in the kernel cannot be given up, and a stuck writer would
// cost a thread with every attempt.
func lockToRead(ctx context.Context, f *os.File) error {
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		if ok, err := kernel.TryFlock(f); ok || err != nil {
			return err
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return fault.Unavailablef("lock %s: another process held it for too long: %w", f.Name(), ctx.Err())
		}
	}
}

// parseStore reads the content of a store.
func parseStore(b []byte) ([]netip.Addr, error) {
	if len(b) > maxStore {
		return nil, fault.Invalidf("longer than %d bytes", maxStore)
	}
	if len(b) == 0 {
		return nil, nil
	}
	var entries map[string]struct {
		IP string `json:"ip"`
	}
	if err := json.Unmarshal(b, &entries); err != nil {
		return nil, fault.New(fault.Invalid, err)
	}
	addrs := make([]netip.Addr, 0, len(entries))
	for handle, e := range entries {
		a, err := netip.ParseAddr(e.IP)
		if err != nil {
			return nil, fault.Invalidf("entry %q: invalid ip: %s", handle, e.IP)
		}
		addrs = append(addrs, a)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs, nil
}
