package config_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/config"
)

type sample struct {
	Port     int    `json:"listen_port"`
	Host     string `json:"listen_host"`
	Database struct {
		Type string `json:"type"`
	} `json:"database"`
}

func (s *sample) Validate(p *config.Problems) {
	p.Require("listen_host", s.Host != "", "an address")
	if s.Port < 1 {
		p.Addf("listen_port", "%d: expected 1 to 65535", s.Port)
	}
}

func TestParseKeepsDefaultsAndReadsAnyCase(t *testing.T) {
	s := sample{Port: 4103, Host: "0.0.0.0"}
	warnings, err := config.Parse([]byte(`{"LISTEN_HOST":"127.0.0.1","metron_port":1,"database":{"Type":"x","user":"y"}}`), &s, "metron_port", "database.user")
	if err != nil {
		t.Fatal(err)
	}
	if s.Port != 4103 || s.Host != "127.0.0.1" || s.Database.Type != "x" {
		t.Errorf("read %+v", s)
	}
	if len(warnings) != 2 || !slices.IsSorted(warnings) {
		t.Errorf("warnings %q, want one for each of the two ignored keys", warnings)
	}
}

func TestAllProblemsAreReported(t *testing.T) {
	var s sample
	_, err := config.Parse([]byte(`{"listen_prot":1,"database":{"tipe":"x"},"zzzzzzzzzzzz":1}`), &s)
	if !errors.Is(err, fault.Invalid) {
		t.Fatalf("%v, want an Invalid fault", err)
	}
	for _, want := range []string{`listen_prot: unknown key: did you mean "listen_port"?`, `database.tipe: unknown key: did you mean "database.type"?`, "zzzzzzzzzzzz: unknown key\n", "listen_host: missing", "listen_port: 0"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q:\n%v", want, err)
		}
	}
}

func TestWrongTypeNamesTheKey(t *testing.T) {
	var s sample
	_, err := config.Parse([]byte(`{"listen_port":"1"}`), &s)
	if err == nil || !strings.Contains(err.Error(), "listen_port") {
		t.Errorf("%v, want the key named", err)
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.json")
	if _, err := config.Load(path, &sample{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := config.Load(path, &sample{}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%v, want the file named", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"listen_port":1}`))
	f.Add([]byte(`{"database":{"type":null}}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s sample
		if _, err := config.Parse(b, &s); err != nil && !errors.Is(err, fault.Invalid) {
			t.Fatalf("%v is not an Invalid fault", err)
		}
	})
}

func TestUnknown(t *testing.T) {
	var tree map[string]json.RawMessage
	if err := json.Unmarshal([]byte(`{"Name":"a","x":1,"inner":{"Y":2,"deep":{"z":3}},"list":[{"w":4}],"any":{"v":5},"text":{"u":6}}`), &tree); err != nil {
		t.Fatal(err)
	}
	var into struct {
		Name  string `json:"name"`
		Inner *struct {
			Deep struct{} `json:"deep"`
		} `json:"inner"`
		List []struct{}     `json:"list"`
		Any  map[string]int `json:"any"`
		Text netip.Addr     `json:"text"`
	}
	got := config.Unknown(tree, &into)
	slices.Sort(got)
	if want := []string{"inner.Y", "inner.deep.z", "x"}; !slices.Equal(got, want) {
		t.Errorf("unknown keys %q, want %q", got, want)
	}
}
