package policyagent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// storeEntry is a container in the deployed wrapper plugin's store.
type storeEntry struct {
	Handle   string          `json:"handle"`
	IP       string          `json:"ip"`
	Metadata json.RawMessage `json:"metadata"`
}

const (
	maxStore  = 64 << 20        // bytes
	storeWait = 2 * time.Second // for the lock on the store
)

// readStore returns the entries of the deployed store by container id. It is one JSON object that its writer overwrites in place while it
// holds the lock on the file beside it. A store that is empty or does not exist has no entries. It is only read: nothing of it
// is made.
func readStore(ctx context.Context, path string) (map[string]storeEntry, error) {
	unlock, err := lockStore(ctx, path+"_lock")
	if err != nil {
		return nil, fmt.Errorf("lock store: %w", err)
	}
	defer unlock()
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxStore+1))
	if err == nil {
		var entries map[string]storeEntry
		if entries, err = parseStore(b); err == nil {
			return entries, nil
		}
	}
	return nil, fmt.Errorf("read store %s: %w", path, err)
}

// lockStore takes the lock. Without the file, which the first writer makes, there is none. It asks again and again: a wait in the kernel cannot
// be given up, and a stuck writer would cost a thread with every attempt.
func lockStore(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, storeWait)
	defer cancel()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		ok, err := kernel.TryFlock(f)
		if ok {
			return func() { f.Close() }, nil
		}
		if err == nil {
			select {
			case <-again.C:
				continue
			case <-ctx.Done():
				err = fault.Unavailablef("another process held it for too long: %w", ctx.Err())
			}
		}
		f.Close()
		return nil, err
	}
}

// parseStore reads the content of a store. An entry that is no object is one without an address, which its user refuses.
func parseStore(b []byte) (map[string]storeEntry, error) {
	if len(b) > maxStore {
		return nil, fault.Invalidf("longer than %d bytes", maxStore)
	}
	if len(b) == 0 {
		return nil, nil
	}
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(b, &raw); err != nil {
		return nil, fault.New(fault.Invalid, err)
	}
	entries := make(map[string]storeEntry, len(raw))
	for id, v := range raw {
		var e storeEntry
		if json.Unmarshal(v, &e) != nil {
			e = storeEntry{}
		}
		entries[id] = e
	}
	return entries, nil
}
