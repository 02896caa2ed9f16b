package archtest_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// testFiles calls each with every test file of the repository.
func testFiles(t *testing.T, each func(room string, f *ast.File)) {
	t.Helper()
	err := filepath.WalkDir("../..", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel("../..", filepath.Dir(path))
		each(filepath.ToSlash(dir), f)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestEveryFailureHasItsTest: the rows of ARCHITECTURE.md name tests by their room, and those are there.
func TestEveryFailureHasItsTest(t *testing.T) {
	tests := map[string][]string{} // by name: rooms
	testFiles(t, func(room string, f *ast.File) {
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "Test") {
				tests[fn.Name.Name] = append(tests[fn.Name.Name], filepath.Base(room))
			}
		}
	})
	_, table, ok := strings.Cut(read(t, "../../ARCHITECTURE.md"), "\n## When a part fails\n")
	if !ok {
		t.Fatal("ARCHITECTURE.md has no failure table")
	}
	rows := 0
	word := regexp.MustCompile("`?\\w+`?")
	for line := range strings.Lines(table) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) != 5 || strings.HasPrefix(cells[1], " ---") || cells[3] == " test " {
			continue
		}
		rows++
		room, named := "", 0
		for _, w := range word.FindAllString(cells[3], -1) {
			name := strings.Trim(w, "`")
			if !strings.HasPrefix(name, "Test") {
				room = name
				continue
			}
			named++
			if !within(room, tests[name]) {
				t.Errorf("%s: no %s in room %q, it is in %q", strings.TrimSpace(cells[1]), name, room, tests[name])
			}
		}
		if named == 0 {
			t.Errorf("%s: no test is named", strings.TrimSpace(cells[1]))
		}
	}
	if rows < 20 {
		t.Errorf("only %d rows were read", rows)
	}
}

// TestCIRequiresEveryCapability: what a test may be skipped for, it may not be skipped for in CI.
func TestCIRequiresEveryCapability(t *testing.T) {
	_, list, _ := strings.Cut(read(t, "../../.ci/run"), "SILK_TEST_REQUIRE=")
	list, _, _ = strings.Cut(list, "\n")
	required := strings.Split(list, ",")
	found := 0
	testFiles(t, func(room string, f *ast.File) {
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) != 3 {
				return true
			}
			if s, ok := call.Fun.(*ast.SelectorExpr); !ok || s.Sel.Name != "Require" {
				return true
			}
			lit, ok := call.Args[1].(*ast.BasicLit)
			if !ok {
				return true // a name from a list of engines or runtimes
			}
			found++
			if name, err := strconv.Unquote(lit.Value); err != nil || !within(name, required) {
				t.Errorf("%s: %s is not in SILK_TEST_REQUIRE of .ci/run", room, lit.Value)
			}
			return true
		})
	})
	if found < 10 {
		t.Errorf("only %d requirements were found", found)
	}
}
