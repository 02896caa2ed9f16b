package endpoint

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// Reaper forgets endpoints that their runtime will never detach: after a crash some do not. An endpoint is dead when the
// kernel has no device of it and its namespace does not have its name any more. Then the container, if any process of it
// is left, has no network, and its address keeps nobody from anything. A Reaper is not safe for concurrent use.
type Reaper struct {
	Dir   *Dir
	Grace time.Duration // how long an endpoint must have been dead: the runtime is to have the first word

	since map[string]time.Time // by file, when it was first found dead
}

// Pass looks at every record, in the host namespace of the calling thread, and returns how many it forgot. A record that
// somebody works on is left alone. now is the time by the clock that Grace is measured with.
func (r *Reaper) Pass(now time.Time) (int, error) {
	names, err := r.Dir.entries()
	if err != nil {
		return 0, err
	}
	host, err := kernel.Dial(nil)
	if err != nil {
		return 0, err
	}
	defer host.Close()
	was := r.since
	r.since = map[string]time.Time{}
	forgotten := 0
	var errs []error
	for _, e := range names {
		first, known := was[e.file]
		if !known {
			first = now
		}
		dead, err := r.Dir.reap(host, e, known && now.Sub(first) >= r.Grace)
		switch {
		case err != nil:
			errs = append(errs, err)
		case dead == gone:
			forgotten++
		case dead == lost:
			r.since[e.file] = first
		}
	}
	if len(errs) == 0 {
		if _, err := r.Dir.RemoveOrphans(context.Background()); err != nil {
			errs = append(errs, err)
		}
	}
	return forgotten, errors.Join(errs...)
}

// What reap found.
const (
	lives = iota // or nobody knows
	lost
	gone // by now
)

// reap reports whether the endpoint is dead and, if told to, forgets it. The lock on its record keeps ADD and DEL away: an ADD
// holds it from before there is a device.
func (d *Dir) reap(host *kernel.Conn, e entry, forget bool) (int, error) {
	f, err := kernel.OpenFile(filepath.Join(d.path, e.file), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return lives, nil // gone meanwhile, or DEL's business
	}
	defer f.Close()
	if ok, err := kernel.TryFlock(f); !ok {
		return lives, err
	}
	if same, _ := f.Is(filepath.Join(d.path, e.file)); !same {
		return lives, nil
	}
	r, err := decode(f, e)
	if err != nil || r.Device == "" {
		return lives, nil // what it stands for is not known
	}
	if there, err := exists(host, r.Device); there || err != nil {
		return lives, err
	}
	if named, err := r.named(); named || err != nil {
		return lives, err
	}
	if !forget {
		return lost, nil
	}
	if err := errors.Join(r.remove(host, true), flush(r)); err != nil {
		return lost, err
	}
	return gone, d.forget(&hold{entry: e})
}

// named reports whether the namespace of the record still has its name.
func (r Record) named() (bool, error) {
	ns, err := kernel.OpenNS(r.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer ns.Close()
	id, err := ns.ID()
	return id == r.Namespace, err
}
