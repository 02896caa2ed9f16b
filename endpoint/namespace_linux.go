package endpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"strconv"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// OpenNamespace opens the network namespace of an endpoint, with the host namespace of the calling thread as the one that has the endpoint's
// device. The kernel says whether it is the right one: the container's end of the device must be in it, so neither a path that
// leads to another container by now nor a number that was used again is taken for it. When the path has gone, a process in the namespace
// leads to it. fault.NotFound when the container has no network any more, or its namespace has neither name nor process. The caller closes
// it, and soon if it is to vanish with its container.
func OpenNamespace(r Record) (*kernel.NS, error) {
	host, err := kernel.Dial(nil)
	if err != nil {
		return nil, err
	}
	defer host.Close()
	ns, err := r.open(host)
	if err != nil {
		return nil, fmt.Errorf("open network namespace of endpoint %v: %w", r.Key, err)
	}
	return ns, nil
}

func (r Record) open(host *kernel.Conn) (*kernel.NS, error) {
	link, err := observeLink(host, r.Device)
	if err != nil {
		return nil, err
	}
	if link.index == 0 || link.kind != "veth" {
		return nil, fault.NotFoundf("the host has no device %s", r.Device)
	}
	for path, err := range r.paths() {
		if err != nil {
			return nil, err
		}
		ns, err := kernel.OpenNS(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		ok, err := r.isEnd(host, ns, link)
		if ok {
			return ns, nil
		}
		ns.Close()
		if err != nil {
			return nil, err
		}
	}
	return nil, fault.NotFoundf("neither %s nor a process leads to it", r.Path)
}

// paths yields what may lead to the namespace, likeliest first.
func (r Record) paths() iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		if !yield(r.Path, nil) {
			return
		}
		names, err := kernel.ReadNames("/proc")
		if err != nil {
			yield("", err)
			return
		}
		for _, n := range names {
			if _, err := strconv.Atoi(n); err != nil {
				continue
			}
			path := "/proc/" + n + "/ns/net"
			var st unix.Stat_t
			if unix.Stat(path, &st) == nil && (kernel.NSID{Dev: uint64(st.Dev), Ino: st.Ino}) == r.Namespace && !yield(path, nil) {
				return
			}
		}
	}
}

// isEnd reports whether ns is the record's and has the other end of the device.
func (r Record) isEnd(host *kernel.Conn, ns *kernel.NS, link device) (bool, error) {
	if id, err := ns.ID(); err != nil || id != r.Namespace {
		return false, err
	}
	number, err := host.NumberOf(ns)
	return err == nil && number >= 0 && number == link.elsewhere, err
}
