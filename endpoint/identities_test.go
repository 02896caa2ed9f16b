package endpoint

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
)

func TestIdentitiesAreKept(t *testing.T) {
	d, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	one, two := netip.MustParseAddr("10.255.1.1"), netip.MustParseAddr("10.255.1.2")
	if got, err := d.Identities(); err != nil || got != nil {
		t.Errorf("without a list: %v, %v", got, err)
	}
	other := Identity{two, kernel.NSID{}, "x", Says([]byte(`{"a":1}`), nil)}
	was, is := Identity{one, kernel.NSID{Dev: 4, Ino: 7}, "a \"b\"\nc", Says(nil, []byte(`[]`))}, Identity{one, kernel.NSID{Dev: 4, Ino: 8}, "", ""}
	if err := d.SetIdentities([]Identity{other, was, is}); err != nil {
		t.Fatal(err)
	}
	if got, err := d.Identities(); err != nil || !slices.Equal(got, []Identity{was, is, other}) {
		t.Errorf("%+v, %v, want all that were listed, in order", got, err)
	}
	if records, bad, err := d.List(); err != nil || len(records)+len(bad) > 0 {
		t.Errorf("the list counts as records: %v, %v, %v", records, bad, err)
	}
	for _, line := range []string{"10.255.1.1 4:7\n", "10.255.1.1 4:7 \"a\"b\n", "10.255.1.1 4:7 \"a\" 0123\n", "10.255.1.1 4:7 \"a\" \n", "10.255.1.1 4:7 \"a\"0123456789abcdef\n"} {
		if err := os.WriteFile(filepath.Join(d.Path(), identityFile), []byte(line), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := d.Identities(); err == nil {
			t.Errorf("%q was read as %v", line, got)
		}
	}
}

func FuzzIdentities(f *testing.F) {
	f.Add("10.255.1.1 4:7 \"a\"\n10.255.1.2 0:0 \"\"\n")
	f.Add("10.255.1.1")
	f.Add("10.255.1.1 4:7 \"a b\" 0123456789abcdef\n")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parseIdentities(text)
		if err != nil {
			return
		}
		d := &Dir{t.TempDir()}
		if err := d.SetIdentities(list); err != nil {
			t.Fatal(err)
		}
		for _, i := range list {
			if got, err := d.Identities(); err != nil || !slices.Contains(got, i) {
				t.Errorf("%+v is lost: %v, %v", i, got, err)
			}
		}
	})
}
