package testkit

import (
	"os"
	"path/filepath"
	"testing"
)

// TestADirectoryInUseIsKeptWhoeverUsesIt has one that is held by a process of another PID namespace, whose number means nothing here.
func TestADirectoryInUseIsKeptWhoeverUsesIt(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	dir, err := newDir("xx", nil)
	if err != nil {
		t.Fatal(err)
	}
	theirs := filepath.Join(filepath.Dir(dir), "silk-xx-2147483646-1")
	if err := os.Rename(dir, theirs); err != nil {
		t.Fatal(err)
	}
	left := filepath.Join(filepath.Dir(dir), "silk-xx-2147483645-1")
	if err := os.Mkdir(left, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(left, lockName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := newDir("xx", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(theirs); err != nil {
		t.Errorf("a directory in use was removed: %v", err)
	}
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("what a dead run left is there: %v", err)
	}
}
