package endpoint

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// DefaultDir is where records are kept unless a configuration says otherwise. It is to be on a file system that a
// reboot empties; on one that does not, records of an earlier boot are void.
const DefaultDir = "/run/silk/endpoints"

// Names in the directory that are no records begin with a dot.
const (
	lockFile   = ".lock"
	bootFile   = ".boot"   // the id of the boot that the records belong to
	sysctlDir  = ".sysctl" // kernel.Sysctls
	cursorFile = ".cursor-"
	portFile   = ".ports" // which ports of the host lead to which endpoint
	tempFile   = ".tmp-"
)

// Dir is the directory of records. Its methods are safe for concurrent use, also by several processes: what allocates
// holds a lock on the directory, what works on one endpoint a lock on its record.
type Dir struct{ path string }

// Open makes the directory if it is missing and returns it.
func Open(path string) (*Dir, error) {
	if _, err := os.Stat(path); err != nil {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, fmt.Errorf("open endpoint directory: %w", err)
		}
	}
	return &Dir{path}, nil
}

// Path returns the directory.
func (d *Dir) Path() string { return d.path }

// Sysctls returns the record of the host's sysctls that Silk changed. It is kept with the endpoints because a reboot
// must lose both.
func (d *Dir) Sysctls() *kernel.Sysctls {
	return &kernel.Sysctls{Dir: filepath.Join(d.path, sysctlDir)}
}

// Bad is a file that stands for an endpoint but cannot be read as its record. What its name tells is filled in: it still
// holds its addresses, and Detach removes it.
type Bad struct {
	File      string
	Key       Key
	Addresses []netip.Addr
	Err       error
}

// List returns all records, in the order of their addresses, and apart from them those that cannot be read. It takes no
// lock: a record that comes or goes meanwhile may be listed or not. A missing directory holds none.
func (d *Dir) List() ([]Record, []Bad, error) {
	names, err := d.entries()
	if err != nil {
		return nil, nil, err
	}
	var records []Record
	var bad []Bad
	for _, e := range names {
		r, err := d.read(e)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			bad = append(bad, Bad{e.file, e.key, e.addresses, err})
		default:
			records = append(records, r)
		}
	}
	slices.SortFunc(records, func(a, b Record) int { return a.Address().Compare(b.Address()) })
	return records, bad, nil
}

// Lookup returns k's record. fault.NotFound when there is none, another error when it cannot be read.
func (d *Dir) Lookup(k Key) (Record, error) {
	e, ok, err := d.find(k)
	if err != nil {
		return Record{}, err
	}
	if !ok {
		return Record{}, fault.NotFoundf("no endpoint %v in %s", k, d.path)
	}
	return d.read(e)
}

// Has reports whether an endpoint has the address.
func (d *Dir) Has(a netip.Addr) (bool, error) {
	names, err := d.entries()
	return slices.ContainsFunc(names, func(e entry) bool { return slices.Contains(e.addresses, a) }), err
}

// find returns the entry of k.
func (d *Dir) find(k Key) (entry, bool, error) {
	list, err := d.live()
	if err != nil {
		return entry{}, false, err
	}
	e, ok := list.find(k)
	return e, ok, nil
}

// entries returns what the names of the records tell, nothing if they are of an earlier boot.
func (d *Dir) entries() ([]entry, error) {
	list, err := d.live()
	return list.entries(), err
}

// live returns the names in the directory, none if they are of an earlier boot.
func (d *Dir) live() (listing, error) {
	boot, err := kernel.ReadFile(filepath.Join(d.path, bootFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("read endpoint directory: %w", err)
	default:
		if id, err := bootID(); err != nil || !bytes.Equal(boot, id) {
			return nil, err
		}
	}
	return d.files()
}

// files returns the names in the directory.
func (d *Dir) files() (listing, error) {
	list, err := kernel.ReadNames(d.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read endpoint directory: %w", err)
	}
	return list, nil
}

// bootID returns what tells this boot of the machine from others. An error must not be taken for another boot: all records would
// be void.
var bootID = sync.OnceValues(func() ([]byte, error) {
	b, err := kernel.ReadFile("/proc/sys/kernel/random/boot_id")
	if err == nil && len(b) == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("find out which boot this is: %w", err)
	}
	return b, nil
})

// maxRecord bounds a record's file; metadata is what makes one long.
const maxRecord = 1 << 20

// read returns the record of e. One that does not say what its name says is an error.
func (d *Dir) read(e entry) (Record, error) {
	f, err := kernel.OpenFile(filepath.Join(d.path, e.file), os.O_RDONLY, 0)
	if err != nil {
		return Record{}, fmt.Errorf("read endpoint record: %w", err)
	}
	defer f.Close()
	return decode(f, e)
}

func decode(f io.Reader, e entry) (Record, error) {
	b, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return Record{}, fmt.Errorf("read endpoint record: %w", err)
	}
	var r Record
	if err := json.Unmarshal(b, &r); err != nil {
		return Record{}, fmt.Errorf("read endpoint record %s: %w", e.file, err)
	}
	if len(b) > maxRecord || r.Key.file(r.Addresses) != e.file || r.Device != Device(r.Address()) {
		return Record{}, fmt.Errorf("read endpoint record %s: it is another endpoint's", e.file)
	}
	return r, nil
}

// guard is the lock on the directory, held by what allocates.
type guard struct{ f *kernel.File }

func (g guard) unlock() { g.f.Close() }

// lock takes the lock on the directory and makes it usable: records of an earlier boot and what a killed process
// was still writing are removed.
func (d *Dir) lock(ctx context.Context) (guard, error) {
	f, err := kernel.OpenFile(filepath.Join(d.path, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return guard{}, fmt.Errorf("lock endpoint directory: %w", err)
	}
	if err := kernel.Flock(ctx, f); err != nil {
		f.Close()
		return guard{}, fmt.Errorf("lock endpoint directory: %w", err)
	}
	if err := d.renew(f.Volatile()); err != nil {
		f.Close()
		return guard{}, fmt.Errorf("renew endpoint directory after a reboot: %w", err)
	}
	return guard{f}, nil
}

// renew empties the directory of what an earlier boot left. One that a reboot empties by itself needs no note of the boot.
func (d *Dir) renew(volatile bool) error {
	was, err := kernel.ReadFile(filepath.Join(d.path, bootFile))
	noted := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if !noted && volatile {
		return nil
	}
	id, err := bootID()
	if err != nil || noted && bytes.Equal(was, id) {
		return err
	}
	if noted {
		files, err := d.files()
		if err != nil {
			return err
		}
		for _, f := range files {
			if !ours(f) {
				continue
			}
			if err := os.RemoveAll(filepath.Join(d.path, f)); err != nil {
				return err
			}
		}
	}
	return d.replace(bootFile, id, true)
}

// ours reports whether a file is void after a reboot. The directory may have been somebody else's before it was ours.
func ours(file string) bool {
	_, record := parseName(file)
	return record || file == sysctlDir || file == portFile || strings.HasPrefix(file, tempFile) || strings.HasPrefix(file, cursorFile)
}

// replace writes a file atomically. Records are not made durable: after a crash of the machine they are void.
func (d *Dir) replace(name string, content []byte, durable bool) error {
	f, err := os.CreateTemp(d.path, tempFile)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil && durable {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(d.path, name))
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
