package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// The wrapper's store (its configuration key datastore) tells loggers, and agents of earlier releases, which container has which address and
// metadata. It is one JSON object; its lock is a file beside it (_lock), and so is a number (_version) that changes with it: its readers look at
// that, without the lock, to find out whether to read the store again. So the number is written first: a reader that sees the new one waits for
// the lock and finds what belongs to it, and one that is killed between the two has changed nothing but the number.

// metadataPut enters the endpoint in the wrapper's store.
func (c *call) metadataPut(ctx context.Context, r endpoint.Record) error {
	return c.metadataUpdate(ctx, func(entries map[string]json.RawMessage) bool { return metadataEntry(r).put(entries) })
}

func metadataEntry(r endpoint.Record) storeEntry {
	return storeEntry{r.Container, r.Address().String(), r.Metadata}
}

// metadataDelete takes the endpoint out of it.
func (c *call) metadataDelete(ctx context.Context, r endpoint.Record) error {
	return c.metadataUpdate(ctx, func(entries map[string]json.RawMessage) bool {
		_, there := entries[r.Container]
		delete(entries, r.Container)
		return there
	})
}

// metadataHas reports whether it is in, also when there is no such store.
func (c *call) metadataHas(ctx context.Context, r endpoint.Record) (bool, error) {
	has := c.wrapper == nil
	err := c.metadataUpdate(ctx, func(entries map[string]json.RawMessage) bool {
		var e storeEntry
		v, there := entries[r.Container]
		has = there && json.Unmarshal(v, &e) == nil && e.IP == r.Address().String()
		return false
	})
	return has, err
}

// metadataUpdate lets change work on the entries and, if it says so, replaces store and version. Without a store it does nothing. One that cannot
// be understood is kept beside, and made again from the endpoint records.
func (c *call) metadataUpdate(ctx context.Context, change func(map[string]json.RawMessage) bool) error {
	if c.wrapper == nil || !filepath.IsAbs(c.wrapper.Datastore) {
		return nil
	}
	path := c.wrapper.Datastore
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	lock, err := kernel.LockPath(ctx, path+"_lock")
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	defer lock.Close()
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open data file: %w", err)
	}
	defer f.Close()
	os.Remove(kernel.TempOf(path)) // a writer was killed
	os.Remove(kernel.TempOf(path + "_version"))
	b, err := io.ReadAll(io.LimitReader(f, maxStore+1))
	if err != nil {
		return fmt.Errorf("read data file: %w", err)
	}
	entries, err := parseStore(b)
	dirty := err != nil
	if dirty {
		if entries, err = c.mendStore(path, err, metadataEntry); err != nil {
			return err
		}
	}
	if !change(entries) && !dirty {
		return nil
	}
	if err := c.wrapper.own(lock, f); err != nil {
		return err
	}
	if err := c.wrapper.bump(path+"_version", len(b) == 0); err != nil {
		return fmt.Errorf("version file: %w", err)
	}
	if err := replaceStore(f, path, entries); err != nil {
		return fmt.Errorf("encode and overwrite: %w", err)
	}
	return nil
}

// bump writes the next number. One that is missing, or none, where there has been a store may have been any: what is written then is higher than all
// that counting leads to.
func (w *wrapper) bump(path string, fresh bool) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := w.own(f); err != nil {
		return err
	}
	b, err := io.ReadAll(io.LimitReader(f, 64))
	if err != nil {
		return err
	}
	now, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 63)
	switch {
	case err == nil && now > 0:
	case fresh:
		now = 1
	default:
		now = time.Now().Unix()
	}
	return kernel.ReplaceLocked(f, path, strconv.AppendInt(nil, now+1, 10))
}

// owner returns who is to own the files, -1 for nobody in particular.
func (w *wrapper) owner() (uid, gid int, err error) {
	uid, gid = -1, -1
	if w.DatastoreOwner == "" && w.DatastoreGroup == "" {
		return uid, gid, nil
	}
	u, err := user.Lookup(w.DatastoreOwner)
	if err != nil {
		return -1, -1, fmt.Errorf("datastore_file_owner: %w", err)
	}
	g, err := user.LookupGroup(w.DatastoreGroup)
	if err != nil {
		return -1, -1, fmt.Errorf("datastore_file_group: %w", err)
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(g.Gid)
	return uid, gid, errors.Join(err1, err2)
}

// own gives files to their owner. What replaces them gets him from them. Where he is not known any more, they stay whose they are: nothing has to
// stay in a store for that.
func (w *wrapper) own(files ...*os.File) error {
	uid, gid, err := w.owner()
	if err != nil || uid < 0 {
		return nil
	}
	for _, f := range files {
		if err := f.Chown(uid, gid); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
