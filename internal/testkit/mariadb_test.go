package testkit

import (
	"os"
	"path/filepath"
	"testing"
)

// TestMariaDBLeavesTemporaryTablesOfOthersAlone starts a server beside what looks like a temporary table of another one. A server that starts removes
// what it finds of that kind in its temporary directory, and so ended the installation of another one.
func TestMariaDBLeavesTemporaryTablesOfOthersAlone(t *testing.T) {
	tmp, err := os.MkdirTemp("", "silk-tmp-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	if err := os.Chmod(tmp, 0o777); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", tmp)
	theirs := filepath.Join(tmp, "#sql-temptable-471-1-1c.MAI")
	if err := os.WriteFile(theirs, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(theirs, 0o666); err != nil {
		t.Fatal(err)
	}
	s, err := StartMariaDB(t.Context(), Options{})
	if err != nil {
		Require(t, "mariadb", err)
	}
	defer s.Stop()
	if _, err := os.Stat(theirs); err != nil {
		t.Error(err)
	}
}
