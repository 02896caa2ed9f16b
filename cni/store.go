package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// The store of earlier releases (configuration key datastore) tells their silk-daemon which containers there are. It is one
// JSON object in a file that is its own lock. We replace the file instead of writing into it, so that a crash never
// leaves half of it; whoever waits for the lock of a file that was replaced must look again.

// storeEntry is one container in the store.
type storeEntry struct {
	Handle   string          `json:"handle"`
	IP       string          `json:"ip"`
	Metadata json.RawMessage `json:"metadata"`
}

// storeKey returns the handle that earlier releases give a container: the base name of its namespace's path. Runtimes
// that name a namespace by a process would make that "net" for all; then it is the container's id.
func storeKey(netns, container string) string {
	if netns == "" || strings.HasPrefix(filepath.Clean(netns), "/proc/") {
		return container
	}
	return filepath.Base(netns)
}

// storePut enters the endpoint.
func (c *call) storePut(ctx context.Context, r endpoint.Record) error {
	return c.storeUpdate(ctx, func(entries map[string]json.RawMessage) bool { return storeEntryOf(r).put(entries) })
}

// storeEntryOf returns the endpoint's entry.
func storeEntryOf(r endpoint.Record) storeEntry {
	return storeEntry{storeKey(r.Path, r.Container), r.Address().String(), nil}
}

// put enters e and reports whether that changes anything.
func (e storeEntry) put(entries map[string]json.RawMessage) bool {
	v, err := json.Marshal(e)
	if err != nil || bytes.Equal(entries[e.Handle], v) {
		return false
	}
	entries[e.Handle] = v
	return true
}

// storeDelete removes the endpoint, by the handles it may have and by its address. What has such a handle and the address of
// another endpoint stays: a handle is a namespace's, which may have two interfaces, or be another container's by now.
func (c *call) storeDelete(ctx context.Context, r endpoint.Record) error {
	handles := []string{storeKey(r.Path, r.Container), storeKey(c.netns, r.Container)}
	return c.storeUpdate(ctx, func(entries map[string]json.RawMessage) bool {
		n := len(entries)
		for h, v := range entries {
			var e storeEntry
			readable := json.Unmarshal(v, &e) == nil
			switch {
			case readable && r.Address().IsValid() && e.IP == r.Address().String():
				delete(entries, h)
			case slices.Contains(handles, h) && !(readable && c.recorded(e.IP)):
				delete(entries, h)
			}
		}
		return len(entries) != n
	})
}

// recorded reports whether an endpoint has the address.
func (c *call) recorded(ip string) bool {
	a, err := netip.ParseAddr(ip)
	if err != nil {
		return false
	}
	dir, err := endpoint.Open(c.cfg.EndpointDir)
	if err != nil {
		return false
	}
	has, err := dir.Has(a)
	return has && err == nil
}

// storeHas reports whether the endpoint is in the store.
func (c *call) storeHas(ctx context.Context, r endpoint.Record) (bool, error) {
	has := false
	err := c.storeUpdate(ctx, func(entries map[string]json.RawMessage) bool {
		var e storeEntry
		v, there := entries[storeKey(r.Path, r.Container)]
		has = there && json.Unmarshal(v, &e) == nil && e.IP == r.Address().String()
		return false
	})
	return has, err
}

// maxStore bounds the store in bytes.
const maxStore = 64 << 20

// storeUpdate lets change work on the entries and, if it says so, replaces the file. Without the key it does nothing. A store
// that cannot be understood is kept beside under another name, loudly, and made again from the endpoint records.
func (c *call) storeUpdate(ctx context.Context, change func(map[string]json.RawMessage) bool) error {
	path := c.cfg.Datastore
	if path == "" {
		return nil
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	f, err := kernel.LockPath(ctx, path)
	if err != nil {
		return fmt.Errorf("open store: %w", err)
	}
	defer f.Close()
	os.Remove(kernel.TempOf(path)) // a writer was killed
	b, err := io.ReadAll(io.LimitReader(f, maxStore+1))
	if err != nil {
		return fmt.Errorf("read store: %w", err)
	}
	entries, err := parseStore(b)
	dirty := false
	if err != nil {
		if entries, err = c.mendStore(path, err, storeEntryOf); err != nil {
			return err
		}
		dirty = true
	}
	if !change(entries) && !dirty {
		return nil
	}
	if err := replaceStore(f, path, entries); err != nil {
		return fmt.Errorf("write store: %w", err)
	}
	return nil
}

// parseStore reads the content of a store. An empty one has no entries. Entries are not looked into.
func parseStore(b []byte) (map[string]json.RawMessage, error) {
	entries := map[string]json.RawMessage{}
	if len(bytes.TrimSpace(b)) == 0 {
		return entries, nil
	}
	if len(b) > maxStore {
		return nil, fmt.Errorf("longer than %d bytes", maxStore)
	}
	if err := json.Unmarshal(b, &entries); err != nil {
		return nil, err
	}
	if entries == nil {
		entries = map[string]json.RawMessage{}
	}
	return entries, nil
}

// mendStore keeps the store that could not be understood and returns what the endpoint records say should be in it.
func (c *call) mendStore(path string, cause error, entry func(endpoint.Record) storeEntry) (map[string]json.RawMessage, error) {
	kept, err := kernel.KeepBroken(path)
	if err != nil {
		return nil, fmt.Errorf("keep broken store (%w): %w", cause, err)
	}
	c.warn("store %s was broken (%v): it is kept as %s and made again from the endpoint records", path, cause, kept)
	entries := map[string]json.RawMessage{}
	dir, err := endpoint.Open(c.cfg.EndpointDir)
	if err != nil {
		return nil, err
	}
	records, _, err := dir.List()
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		e := entry(r)
		v, err := json.Marshal(e)
		if err != nil {
			return nil, err
		}
		entries[e.Handle] = v
	}
	return entries, nil
}

// replaceStore puts a new file with the entries in the place of f, which is locked, with its owner and mode.
func replaceStore(f *os.File, path string, entries map[string]json.RawMessage) error {
	b, err := json.Marshal(entries)
	if err != nil {
		return err
	}
	return kernel.ReplaceLocked(f, path, append(b, '\n'))
}
