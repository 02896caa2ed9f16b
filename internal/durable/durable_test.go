package durable_test

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/durable"
)

func text(s string) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.WriteString(w, s)
		return err
	}
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := durable.Create(path, 0o640, text("one")); err != nil {
		t.Fatal(err)
	}
	if err := durable.Create(path, 0o600, text("two")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second time: %v, want that it is there", err)
	}
	if st, err := os.Stat(path); content(t, path) != "one" || err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%q, mode %v, %v, want what was made first", content(t, path), st.Mode(), err)
	}
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("%v are in the directory, want one file", list)
	}
}

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for _, want := range []string{"one", "", "three"} {
		if err := durable.Replace(path, 0o640, text(want)); err != nil {
			t.Fatal(err)
		}
		if got := content(t, path); got != want {
			t.Errorf("content %q, want %q", got, want)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v, want 0640", st.Mode(), err)
	}
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("%v are in the directory, want one file", list)
	}
}

func TestWhatFailsChangesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := durable.Replace(path, 0o600, text("before")); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if err := durable.Replace(path, 0o600, func(w io.Writer) error { io.WriteString(w, "half"); return broken }); !errors.Is(err, broken) {
		t.Errorf("%v, want the error of who writes", err)
	}
	if err := durable.Replace(filepath.Join(dir, "none", "f"), 0o600, text("x")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, want that there is no directory", err)
	}
	if list, _ := os.ReadDir(dir); content(t, path) != "before" || len(list) != 1 {
		t.Errorf("content %q, and %v in the directory", content(t, path), list)
	}
}

// TestMain is also the process that TestKilled kills.
func TestMain(m *testing.M) {
	path := os.Getenv("DURABLE_TEST_WRITES")
	if path == "" {
		os.Exit(m.Run())
	}
	for i := 0; ; i++ {
		if err := durable.Replace(path, 0o600, text(strings.Repeat(strconv.Itoa(i%10), 100_000))); err != nil {
			os.Exit(1)
		}
		if i == 0 {
			os.Stdout.WriteString("x")
		}
	}
}

// TestKilled: whenever the writer is killed, what is there is whole, and Sweep removes the rest.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for range 10 {
		os.Remove(path)
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "DURABLE_TEST_WRITES="+path)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
			t.Error(err)
		}
		cmd.Process.Kill()
		cmd.Wait()
		if got := content(t, path); len(got) != 100_000 || strings.Count(got, got[:1]) != len(got) {
			t.Fatalf("%d bytes, not of one writing", len(got))
		}
		if err := durable.Sweep(dir); err != nil {
			t.Error(err)
		}
		if list, _ := os.ReadDir(dir); len(list) != 1 {
			t.Errorf("%v are in the directory, want one file", list)
		}
	}
	if err := durable.Sweep(filepath.Join(dir, "none")); err != nil {
		t.Error(err)
	}
}
