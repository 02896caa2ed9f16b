package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// TestDeadEndpointsAreForgotten: a runtime that crashed with its containers never detaches them.
func TestDeadEndpointsAreForgotten(t *testing.T) {
	dir, err := endpoint.Open(filepath.Join(t.TempDir(), "endpoints"))
	if err != nil {
		t.Fatal(err)
	}
	host, err := kernel.NewNS()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	d := &daemon{log: slog.New(slog.DiscardHandler), reaper: endpoint.Reaper{Dir: dir, Grace: reapGrace}}
	subnet := netip.MustParsePrefix("10.255.30.0/24")
	err = host.Do(func() error {
		c, err := kernel.NewNS()
		if err != nil {
			return err
		}
		key := endpoint.Key{Network: "silk", Container: "c1", Interface: "eth0"}
		_, err = dir.Attach(context.Background(), endpoint.Spec{Key: key, Path: "/nowhere", Namespace: c, Subnet: subnet, MTU: 1450, Group: "g"}, nil)
		if err != nil {
			return err
		}
		c.Close()
		taken := func(after time.Duration) int {
			n, _, err := dir.Usage(subnet)
			if err != nil {
				t.Errorf("after %v: %v", after, err)
			}
			return n
		}
		now := time.Now()
		for devices := 1; devices > 0; { // the kernel takes its time
			list, err := endpoint.Containers(nil)
			if err != nil {
				return err
			}
			if devices = len(list); time.Since(now) > 10*time.Second {
				return errors.New("the kernel keeps the device of a dead namespace")
			}
		}
		for after := range 6 {
			d.reap(now.Add(time.Duration(after) * reapInterval))
			d.reap(now.Add(time.Duration(after)*reapInterval + time.Second)) // too early for another look
			if n, want := taken(time.Duration(after)*reapInterval), 1; after < 5 && n != want || after == 5 && n != 0 {
				t.Errorf("after %d minutes %d addresses are taken", after, n)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
