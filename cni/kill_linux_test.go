package cni_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// TestKilledAtEverySystemCall kills ADD, DEL and GC at each call by which they change something or wait, in a namespace that never
// had anything; the operation must then succeed when it is repeated, and a DEL leave nothing.
func TestKilledAtEverySystemCall(t *testing.T) {
	t.Run("plain", func(t *testing.T) { killAtEveryCall(t) })
	t.Run("edge", func(t *testing.T) { killAtEveryCall(t, edge...) })
}

func killAtEveryCall(t *testing.T, more ...any) {
	h := newHost(t)
	store := filepath.Join(h.dir, "store.json")
	more = append([]any{"datastore", store}, more...)
	cfg, gc := h.config(more...), h.config("datastore", store, "cni.dev/valid-attachments", []any{})
	first := h.container("first")
	h.add(first, more...) // what is made once is there from here on
	h.del(first, more...)
	before, files, kills := h.dump(), h.files(), 0
	for _, command := range []string{"ADD", "DEL", "GC"} {
		for _, call := range []string{"sendto", "renameat", "unlinkat", "write", "pwrite64", "flock", "setns"} {
			for n, killed := 1, true; killed && n < 50; n++ {
				c := h.container(fmt.Sprintf("%s-%s-%d", command, call, n))
				config := cfg
				if command != "ADD" {
					h.add(c, more...)
				}
				if command == "GC" {
					config = gc
				}
				out, err := h.injected(fmt.Sprintf("%s:signal=KILL:when=%d", call, n), command, config, c.env()).CombinedOutput()
				if killed = err != nil && len(out) == 0; killed {
					kills++
				} else if err != nil && !strings.Contains(string(out), "cniVersion") {
					t.Fatalf("%s: %v: %s", c.id, err, out)
				}
				if a := h.run(command, config, c.env()); a.code != 0 {
					t.Errorf("%s: again: %s", c.id, a.stdout)
				}
				if a := h.run("CHECK", cfg, c.env()); command == "ADD" && a.code != 0 {
					t.Errorf("%s: CHECK: %s", c.id, a.stdout)
				}
				h.del(c, more...)
				if got := h.dump(); got != before {
					t.Fatalf("%s: the host was\n%s\nand is\n%s", c.id, before, got)
				}
				if got := h.files(); got != files {
					t.Fatalf("%s: files were\n%s\nand are\n%s", c.id, files, got)
				}
			}
		}
	}
	if kills < 30 {
		t.Errorf("killed %d times only: the test does not tell much", kills)
	}
	t.Logf("killed %d times", kills)
}
