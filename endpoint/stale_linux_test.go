package endpoint_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// TestDetachSparesAnotherEndpointInTheNamespace: a runtime may name a namespace that has another container's interface by now,
// because the path was used again, or that another network is attached to by the same name.
func TestDetachSparesAnotherEndpointInTheNamespace(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	r := h.must(h.attach(h.spec("c2", c)))
	other := key("c2")
	other.Network = "other"
	for _, k := range []endpoint.Key{key("c1"), other} {
		var told endpoint.Record
		if err := h.ns.Do(func() error {
			return h.dir.Detach(context.Background(), k, c, func(r endpoint.Record) error { told = r; return nil })
		}); err != nil {
			t.Error(err)
		}
		if told.Address().IsValid() {
			t.Errorf("detaching %v: said that %v was its address", k, told.Address())
		}
		if d := h.check(r.Key, c); len(d) > 0 {
			t.Fatalf("detaching %v took another's interface: %v", k, d)
		}
	}
}

// TestDirectoryWithOtherFiles: after a reboot only what is ours in the directory is void.
func TestDirectoryWithOtherFiles(t *testing.T) {
	h := newHost(t)
	h.must(h.attach(h.spec("c1", netns.New(t))))
	if err := os.Mkdir(filepath.Join(h.dir.Path(), "database"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{".boot": "another\n", "lease.json": "{}", ".profile": "", "database/file": ""} {
		if err := os.WriteFile(filepath.Join(h.dir.Path(), name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.must(h.attach(h.spec("c2", netns.New(t))))
	for _, name := range []string{"lease.json", ".profile", "database/file"} {
		if _, err := os.Stat(filepath.Join(h.dir.Path(), name)); err != nil {
			t.Error(err)
		}
	}
	if f := h.files(); len(f) != 3 {
		t.Errorf("files %v, want c2's record and two foreign ones", f)
	}
}

// TestDeadAttachmentTakesTheSubnetOfNow: what has to be made again is made in the subnet that the host has now.
func TestDeadAttachmentTakesTheSubnetOfNow(t *testing.T) {
	for name, cut := range map[string]func(endpoint.Record, *host, *kernel.NS){
		"device gone": func(r endpoint.Record, h *host, _ *kernel.NS) { ip(t, h.ns, "link", "del", r.Device) },
		"route gone":  func(_ endpoint.Record, _ *host, c *kernel.NS) { ip(t, c, "route", "del", "default") },
	} {
		t.Run(name, func(t *testing.T) {
			h, c := newHost(t), netns.New(t)
			old := h.must(h.attach(h.spec("c1", c)))
			s := h.spec("c1", c)
			s.Subnet = netip.MustParsePrefix("10.255.40.0/24")
			if r := h.must(h.attach(s)); r.Address() != old.Address() {
				t.Errorf("an attachment that works moved from %v to %v", old.Address(), r.Address())
			}
			cut(old, &h, c)
			r := h.must(h.attach(s))
			if !s.Subnet.Contains(r.Address()) {
				t.Errorf("made again with %v, want an address of %v", r.Address(), s.Subnet)
			}
			if d := h.check(r.Key, c); len(d) > 0 {
				t.Error(d)
			}
			if list := h.containers(); len(list) != 1 {
				t.Errorf("devices %v", list)
			}
		})
	}
}

// TestDetachSparesForeignDevices: the name of a device alone does not make it ours.
func TestDetachSparesForeignDevices(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	r := h.must(h.attach(h.spec("c1", c)))
	ip(t, h.ns, "link", "del", r.Device)
	ip(t, h.ns, "link", "add", r.Device, "type", "bridge")
	if err := h.detach(r.Key, nil); err != nil {
		t.Error(err)
	}
	ip(t, h.ns, "link", "del", r.Device, "type", "bridge")
	r = h.must(h.attach(h.spec("c1", c)))
	ip(t, h.ns, "link", "del", r.Device)
	ip(t, h.ns, "link", "add", "uplink", "type", "veth", "peer", "name", "other")
	ip(t, h.ns, "link", "property", "add", "dev", "uplink", "altname", r.Device)
	if err := h.detach(r.Key, nil); err != nil {
		t.Error(err)
	}
	ip(t, h.ns, "link", "show", "uplink")
	if f := h.files(); len(f) > 0 {
		t.Errorf("left %v", f)
	}
}

// TestOddRecordFiles: whatever lies there under a record's name, it is detached and its address is free again.
func TestOddRecordFiles(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"directory": func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) },
		"dangling":  func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/nowhere", p)) },
		"huge":      func(p string) error { return os.Truncate(p, 1<<33) },
		"no mode":   func(p string) error { return os.Chmod(p, 0) },
		"many addresses": func(p string) error {
			return os.Rename(p, p+"+fd00::1")
		},
		"IPv6": func(p string) error { return os.Rename(p, p[:strings.LastIndex(p, "@")]+"@fd00::1") },
	} {
		t.Run(name, func(t *testing.T) {
			h, c := newHost(t), netns.New(t)
			h.must(h.attach(h.spec("c1", c)))
			if err := spoil(filepath.Join(h.dir.Path(), h.files()[0])); err != nil {
				t.Fatal(err)
			}
			if _, _, err := h.dir.List(); err != nil {
				t.Error(err)
			}
			if err := h.detach(key("c1"), c); err != nil {
				t.Error(err)
			}
			if f := h.files(); len(f) > 0 {
				t.Errorf("left %v", f)
			}
		})
	}
}

// TestAttachAfterHalfAnAttachment: whoever made the devices was killed before it came to the container's side, in a namespace that
// has never had a route.
func TestAttachAfterHalfAnAttachment(t *testing.T) {
	h, c, fresh := newHost(t), netns.New(t), netns.New(t)
	s := h.spec("c1", c)
	r := h.must(h.attach(s))
	ip(t, h.ns, "link", "del", r.Device)
	id, err := fresh.ID()
	if err != nil {
		t.Fatal(err)
	}
	r.Namespace = id
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	h.spoil(string(b))
	ip(t, fresh, "link", "add", r.Device, "address", r.HostMAC.String(), "mtu", "1450", "arp", "off", "type", "veth",
		"peer", "eth0", "address", r.ContainerMAC.String(), "mtu", "1450", "arp", "off")
	ip(t, fresh, "link", "set", r.Device, "netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), h.ns.FD()))
	if d := h.check(s.Key, fresh); len(d) == 0 {
		t.Error("nothing differs")
	}
	s.Namespace = fresh
	if again := h.must(h.attach(s)); again.Address() != r.Address() {
		t.Errorf("address %v, want %v again", again.Address(), r.Address())
	}
	if d := h.check(s.Key, fresh); len(d) > 0 {
		t.Error(d)
	}
}
