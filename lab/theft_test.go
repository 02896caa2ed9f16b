package lab_test

import (
	"database/sql"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/lab"
	_ "modernc.org/sqlite"
)

// TestStolenLeaseFencesTheHost gives the subnet of a host with containers to another host, behind everybody's back.
func TestStolenLeaseFencesTheHost(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 3, Containers: 1})
	s := whole(t, l)
	do(t, l.Add(t.Context(), "twin", "host1"))
	local := dialEcho(t, eventually(t, l, "the twin is attached", func(s lab.Status) bool { return s.Path("c1", "twin").OK }), "c1", "twin")
	stolen := host(t, s, "host1").Lease
	db, err := sql.Open("sqlite", filepath.Join(l.Dir(), "nodes/control/controller.db"))
	do(t, err)
	defer db.Close()
	await(t, "the row is changed", func() error { // the controller may be writing just now
		_, err := db.Exec(`UPDATE subnets SET underlay_ip = '10.0.0.250' WHERE overlay_subnet = ?`, stolen.String())
		return err
	})
	eventually(t, l, "host1 is fenced", func(s lab.Status) bool {
		return host(t, s, "host1").State == "fenced" && !s.Path("c1", "c2").OK && !s.Path("c2", "c1").OK && s.Path("c1", "twin").OK && s.Path("c2", "c3").OK
	})
	local.check(t, "on the same host")
	ctx, cancel := shortly(t)
	defer cancel()
	if err := l.Add(ctx, "late", "host1"); err == nil {
		t.Error("a fenced host took a new container")
	}
	eventually(t, l, "the plugin's STATUS says why", func(s lab.Status) bool { return strings.Contains(container(t, s, "late").Error, "host is fenced") })
	do(t, l.Remove(t.Context(), "late"))
	do(t, l.Remove(t.Context(), "c1"))
	do(t, l.Remove(t.Context(), "twin"))
	eventually(t, l, "host1 has a new lease", func(s lab.Status) bool {
		h := host(t, s, "host1")
		return h.State == lab.Ready && h.Lease != stolen && h.Lease.IsValid()
	})
	do(t, l.Add(t.Context(), "new", "host1"))
	if s := whole(t, l); len(s.Paths) != 6 {
		t.Errorf("%d paths, want 6", len(s.Paths))
	}
}
