package testkit

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Golden compares got with what the file at path has, and shows the difference. With update, which a package takes from its -update flag, it writes
// the file first: the difference is then for version control to show.
func Golden(t testing.TB, path, got string, update bool) {
	t.Helper()
	if update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got):\n%s", path, d)
	}
}

// listedBy is the program whose words the files of Listing have: the nft of Debian 12, the oldest that must be able to list what we make.
const listedBy = "nftables v1.0.6 "

// Listing is Golden for what nft lists. Later programs word some expressions in other ways: with one of them tables, sets, maps, chains and the number of lines in each
// chain are compared.
func Listing(t testing.TB, path, got string, update bool) {
	t.Helper()
	version, err := exec.Command("nft", "--version").Output()
	Require(t, "nft", err)
	if strings.HasPrefix(string(version), listedBy) {
		Golden(t, path, got, update)
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(outline(string(want)), outline(got)); d != "" {
		t.Errorf("%s, of %s (-want +got):\n%s", path, version, d)
	}
}

var listed = regexp.MustCompile(`^(table|set|map|chain) .*\{$`)

// outline returns the names in a listing, each of a chain with a dot for every line in it.
func outline(listing string) []string {
	var out []string
	chain := false
	for line := range strings.Lines(listing) {
		line = strings.TrimSpace(line)
		switch {
		case listed.MatchString(line):
			out, chain = append(out, line), strings.HasPrefix(line, "chain ")
		case line == "}":
			chain = false
		case chain && line != "":
			out[len(out)-1] += "."
		}
	}
	return out
}
