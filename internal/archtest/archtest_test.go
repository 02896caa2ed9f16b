package archtest_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "code.cloudfoundry.org/silk"

// The rooms of DESIGN.md section 3. A room also stands for the packages below it unless they are listed themselves.
var (
	nouns    = []string{"fault", "revision", "identity", "lease", "policy", "secgroup", "registration", "authority", "flow"}
	stores   = []string{"lease/leasesql", "lease/leasehttp", "lease/leasetest", "policy/policysql", "policy/policyhttp", "policy/policytest", "registration/registrationhttp", "registration/registrationtest", "authority/authorityhttp", "authority/hostca"}
	kernels  = []string{"overlay", "endpoint", "nat", "firewall", "firewall/nft", "firewall/bpf", "firewall/firewalltest"}
	programs = []string{"controller", "daemon", "cni", "policyserver", "policyagent", "garden", "dns", "tlsproxy", "cli", "lab"}
)

// mayTouchKernel lists who may import netlink, nftables, eBPF or x/sys/unix. Benchmarks measure what the kernel itself takes.
var mayTouchKernel = []string{"internal/kernel", "overlay", "endpoint", "nat", "firewall", "lab", "bench"}

var kernelLibraries = []string{"github.com/vishvananda/netlink", "github.com/vishvananda/netns", "github.com/google/nftables", "github.com/mdlayher/netlink", "github.com/cilium/ebpf", "golang.org/x/sys/unix"}

var databaseDrivers = []string{"modernc.org/sqlite", "github.com/jackc/pgx/v5", "github.com/go-sql-driver/mysql"}

// doesIO lists packages of the standard library that a noun may not import.
var doesIO = []string{"os", "net", "net/http", "database/sql", "os/exec", "syscall", "io/ioutil", "log"}

// typesOnly lists what a noun may import all the same, for types that the standard library wants: crypto/x509 has addresses as net.IP.
var typesOnly = map[string]string{"authority": "net"}

type pkg struct {
	ImportPath string
	Name       string
	Doc        string
	Imports    []string
	Deps       []string
	GoFiles    []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Name,Doc,Imports,Deps,GoFiles", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func room(path string) string { return strings.TrimPrefix(strings.TrimPrefix(path, module), "/") }

// within reports whether the room r is one of list or stands below one.
func within(r string, list []string) bool {
	return slices.ContainsFunc(list, func(l string) bool { return r == l || strings.HasPrefix(r, l+"/") })
}

func isNoun(r string) bool { return within(r, nouns) && !within(r, stores) }

func library(imp string, list []string) bool { return within(imp, list) }

func TestArrows(t *testing.T) {
	for _, p := range packages(t) {
		r := room(p.ImportPath)
		for _, imp := range p.Imports {
			to, ours := strings.CutPrefix(imp, module+"/")
			bad := ""
			switch {
			case !ours && library(imp, kernelLibraries) && !within(r, mayTouchKernel):
				bad = "only internal/kernel, overlay, endpoint, nat, firewall, lab and bench touch the kernel's libraries"
			case !ours && library(imp, databaseDrivers) && r != "internal/sqldb":
				bad = "only internal/sqldb imports database drivers"
			case !ours && isNoun(r) && slices.Contains(doesIO, imp) && typesOnly[r] != imp:
				bad = "a noun does no I/O"
			case !ours:
			case isNoun(r) && !isNoun(to):
				bad = "a noun imports only nouns"
			case within(r, []string{"internal"}) && isNoun(to) && to != "fault":
				bad = "a mechanism knows no noun"
			case within(r, []string{"internal"}) && !within(to, []string{"internal", "fault"}):
				bad = "a mechanism imports only mechanisms"
			case within(r, stores) && within(to, kernels), within(r, kernels) && within(to, stores):
				bad = "stores and kernel rooms do not know each other"
			case within(r, programs) && within(to, programs) && programOf(r) != programOf(to) && !(programOf(r) == "cli" && to == "lab"):
				bad = "programs import no program (cli may use lab)"
			case !within(r, []string{"cmd", "bench"}) && within(to, []string{"cmd", "bench"}):
				bad = "nothing imports a main or a benchmark"
			case within(r, stores) && within(to, programs), within(r, kernels) && within(to, programs):
				bad = "programs stand on top"
			case within(to, []string{"internal/testkit"}) && to != "internal/testkit/pki" && !within(r, []string{"internal/testkit", "lease/leasetest", "policy/policytest", "firewall/firewalltest", "bench"}):
				bad = "testkit is for tests"
			}
			if bad != "" {
				t.Errorf("%s imports %s: %s", r, imp, bad)
			}
		}
	}
}

func programOf(r string) string {
	first, _, _ := strings.Cut(r, "/")
	return first
}

func TestEveryPackageHasAComment(t *testing.T) {
	for _, p := range packages(t) {
		if p.Doc == "" && len(p.GoFiles) > 0 {
			t.Errorf("%s has no package comment", room(p.ImportPath))
		}
	}
}

func TestMainsAreShort(t *testing.T) {
	for _, p := range packages(t) {
		r := room(p.ImportPath)
		if !strings.HasPrefix(r, "cmd/") {
			continue
		}
		if !slices.Equal(p.GoFiles, []string{"main.go"}) {
			t.Errorf("%s has files %v, want main.go only", r, p.GoFiles)
		}
		b, err := os.ReadFile(filepath.Join("../..", r, "main.go"))
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(b, []byte("\n")); n > 30 {
			t.Errorf("%s/main.go has %d lines, want at most 30", r, n)
		}
	}
}

// TestCNIStaysSmall keeps what would slow the plugin's start out of it.
func TestCNIStaysSmall(t *testing.T) {
	for _, p := range packages(t) {
		if r := room(p.ImportPath); r != "cmd/silk-cni" && r != "cmd/cni-wrapper-plugin" && r != "cni" {
			continue
		}
		for _, d := range p.Deps {
			if d == "net/http" || d == "database/sql" || d == "crypto/tls" || strings.HasPrefix(d, "github.com/prometheus/") {
				t.Errorf("%s depends on %s", room(p.ImportPath), d)
			}
		}
	}
}

var update = flag.Bool("update", false, "rewrite the committed dependency lists")

// TestDependencyLists compares what each binary links, outside the standard library, with testdata/PROGRAM.deps.
func TestDependencyLists(t *testing.T) {
	all := packages(t)
	for _, p := range all {
		r := room(p.ImportPath)
		if !strings.HasPrefix(r, "cmd/") {
			continue
		}
		var deps []string
		for _, d := range p.Deps {
			if first, _, _ := strings.Cut(d, "/"); strings.Contains(first, ".") {
				deps = append(deps, d)
			}
		}
		slices.Sort(deps)
		got := strings.Join(deps, "\n") + "\n"
		file := filepath.Join("testdata", filepath.Base(r)+".deps")
		if *update {
			if err := os.MkdirAll("testdata", 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want, err := os.ReadFile(file)
		if err != nil || string(want) != got {
			t.Errorf("%s links other packages than %s says: review the change and run go test ./internal/archtest -update", r, file)
		}
	}
}
