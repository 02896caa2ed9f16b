package cni_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
)

func read(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestStoreIsKeptInStep holds the form that earlier releases of silk-daemon read.
func TestStoreIsKeptInStep(t *testing.T) {
	h := newHost(t)
	store := filepath.Join(h.dir, "not", "yet", "store.json")
	c := h.container("c1")
	h.add(c, "datastore", store)
	want := `{"netns-c1":{"handle":"netns-c1","ip":"10.255.30.2","metadata":null}}` + "\n"
	if got := read(t, store); got != want {
		t.Errorf("store %q, want %q", got, want)
	}
	if st, err := os.Stat(store); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v %v, want 0600", st.Mode(), err)
	}
	if st, err := os.Stat(filepath.Dir(store)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("mode of the directory %v %v, want 0700", st.Mode(), err)
	}
	if a := h.run("CHECK", h.config("datastore", store), c.env()); a.code != 0 {
		t.Error(a.stdout)
	}
	write(t, store, `{"stranger":{"handle":"stranger","ip":"10.255.30.99","metadata":{"a":"<b>"}}}`)
	if _, text := h.run("CHECK", h.config("datastore", store), c.env()).failure(t); !strings.Contains(text, "entry in store "+store+" is missing") {
		t.Error(text)
	}
	h.add(c, "datastore", store) // the same again mends it
	h.del(c, "datastore", store)
	if got := read(t, store); got != `{"stranger":{"handle":"stranger","ip":"10.255.30.99","metadata":{"a":"\u003cb\u003e"}}}`+"\n" {
		t.Errorf("store %q, want the stranger's entry", got)
	}
}

// TestStoreKeyOfAProcessNamespace: /proc/PID/ns/net would make "net" the key of every container.
func TestStoreKeyOfAProcessNamespace(t *testing.T) {
	h := newHost(t)
	store := filepath.Join(h.dir, "store.json")
	c := h.container("c1")
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), c.ns.FD())
	a := h.run("ADD", h.config("datastore", store), c.env("CNI_NETNS", path))
	if a.code != 0 || !strings.Contains(read(t, store), `{"c1":{"handle":"c1"`) {
		t.Errorf("%+v %s", a, read(t, store))
	}
	if a := h.run("DEL", h.config("datastore", store), c.env("CNI_NETNS", "")); a.code != 0 || read(t, store) != "{}\n" {
		t.Errorf("%+v %s", a, read(t, store))
	}
}

func TestStoreOwnerIsKept(t *testing.T) {
	h := newHost(t)
	store := filepath.Join(h.dir, "store.json")
	write(t, store, "")
	if err := os.Chown(store, 1000, 1001); err != nil {
		t.Fatal(err)
	}
	h.add(h.container("c1"), "datastore", store)
	st, err := os.Stat(store)
	if err != nil {
		t.Fatal(err)
	}
	if s := st.Sys().(*syscall.Stat_t); s.Uid != 1000 || s.Gid != 1001 {
		t.Errorf("owner %d:%d, want 1000:1001", s.Uid, s.Gid)
	}
}

// TestBrokenStore: it is kept, loudly, and made again from the records.
func TestBrokenStore(t *testing.T) {
	h := newHost(t)
	store := filepath.Join(h.dir, "store.json")
	c1, c2 := h.container("c1"), h.container("c2")
	h.add(c1, "datastore", store)
	write(t, store, `{"netns-c1":{"handle":"netns-`)
	a := h.run("ADD", h.config("datastore", store), c2.env())
	if a.code != 0 || !strings.Contains(a.stderr, "was broken") {
		t.Errorf("%+v", a)
	}
	var entries map[string]any
	if err := json.Unmarshal([]byte(read(t, store)), &entries); err != nil || len(entries) != 2 {
		t.Errorf("%v %v, want both containers", entries, err)
	}
	kept, err := filepath.Glob(store + ".broken-*")
	if err != nil || len(kept) != 1 || read(t, kept[0]) != `{"netns-c1":{"handle":"netns-` {
		t.Errorf("kept %v %v", kept, err)
	}
	write(t, store, "[]")
	if a := h.run("DEL", h.config("datastore", store), c1.env()); a.code != 0 {
		t.Errorf("%+v", a)
	}
	if got := read(t, store); strings.Contains(got, "netns-c1") || !strings.Contains(got, "netns-c2") {
		t.Errorf("store %s, want c2 only", got)
	}
}

// TestStoreOfManyWriters: nobody's entry is lost, whether the others replace the file, as we do, or write into it, as earlier
// releases do.
func TestStoreOfManyWriters(t *testing.T) {
	h := newHost(t)
	store := filepath.Join(h.dir, "store.json")
	const n = 16
	var wg sync.WaitGroup
	for i := range n {
		c := h.container(fmt.Sprintf("c%d", i))
		wg.Go(func() {
			if a := h.run("ADD", h.config("datastore", store), c.env()); a.code != 0 {
				t.Errorf("%+v", a)
			}
		})
		wg.Go(func() {
			if err := writeInPlace(store, fmt.Sprintf("old%d", i)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	var entries map[string]any
	if err := json.Unmarshal([]byte(read(t, store)), &entries); err != nil || len(entries) != 2*n {
		t.Errorf("%d entries, want %d: %v", len(entries), 2*n, err)
	}
}

// writeInPlace adds an entry as earlier releases do, except that it looks again when the file was replaced while it waited.
func writeInPlace(path, handle string) error {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		if err := kernel.Flock(context.Background(), f); err != nil {
			return err
		}
		a, err1 := f.Stat()
		b, err2 := os.Stat(path)
		if err1 != nil || err2 != nil || !os.SameFile(a, b) {
			f.Close()
			continue
		}
		defer f.Close()
		entries := map[string]any{}
		if a.Size() > 0 {
			if err := json.NewDecoder(f).Decode(&entries); err != nil {
				return err
			}
		}
		entries[handle] = map[string]any{"handle": handle, "ip": "10.9.9.9", "metadata": nil}
		if _, err := f.Seek(0, 0); err != nil {
			return err
		}
		if err := f.Truncate(0); err != nil {
			return err
		}
		return json.NewEncoder(f).Encode(entries)
	}
}

// TestStoreThatCannotBeWritten fails an ADD, which leaves nothing, and no DEL.
func TestStoreThatCannotBeWritten(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	file := filepath.Join(h.dir, "file")
	write(t, file, "")
	impossible := h.config("datastore", filepath.Join(file, "store.json"))
	if code, text := h.run("ADD", impossible, c.env()).failure(t); code != 100 || !strings.Contains(text, "write container metadata") {
		t.Errorf("code %d %q", code, text)
	}
	h.clean()
	h.add(c)
	if a := h.run("DEL", impossible, c.env()); a.code != 0 || !strings.Contains(a.stderr, "container stays in the store") {
		t.Errorf("%+v", a)
	}
	h.clean()
}
