package policyagent

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

// manyRules is a state with n rules, at a revision.
func manyRules(n int, at uint64) saved {
	v := saved{router: 9, held: policy.HeldState{Revision: revision.Revision{Epoch: "e", Counter: at}, Groups: []identity.Group{"b"}}}
	for i := range n {
		port := uint16(1 + i)
		v.held.Listed = append(v.held.Listed, stateRule("a", "b", [2]identity.Tag{1, 2}, policy.TCP, policy.Ports{First: port, Last: port}))
	}
	return v
}

// without is a state at the next revision that lacks a rule.
func (v saved) without(i int) saved {
	v.held.Revision.Counter++
	v.held.Listed = slices.Delete(slices.Clone(v.held.Listed), i, i+1)
	return v
}

// changed saves a list of ten rules and some changes in dir, and returns the file.
func changed(t testing.TB, dir string, changes int) string {
	s := &state{dir: dir}
	v := manyRules(10, 1)
	for i := range changes + 1 {
		if err := s.save(v); err != nil {
			t.Fatal(err)
		}
		if v = v.without(2); i%2 == 1 { // and a rule has other tags
			v.held.Listed[1].SourceTag += 7
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, policiesFile))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestAChangeIsAddedToTheFile(t *testing.T) {
	s := open2(t, t.TempDir())
	path := filepath.Join(s.dir, policiesFile)
	v := manyRules(2000, 1)
	if err := s.save(v); err != nil {
		t.Fatal(err)
	}
	whole, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		v = v.without(100 * i)
		v.held.Listed[7].SourceTag++
		if err := s.save(v); err != nil {
			t.Fatal(err)
		}
		if got, err := (&state{dir: s.dir}).load(); err != nil || !reflect.DeepEqual(got, v) {
			t.Fatalf("change %d: %v, %d rules at %v", i, err, len(got.held.Listed), got.held.Revision)
		}
	}
	more, err := os.Stat(path)
	if err != nil || !os.SameFile(whole, more) || more.Size() > whole.Size()+3000 {
		t.Errorf("%v, %d bytes after %d: want the same file and some lines more", err, more.Size(), whole.Size())
	}
	v.router = 0
	if err := s.save(v); err != nil {
		t.Fatal(err)
	}
	if got, err := s.load(); err != nil || !reflect.DeepEqual(got, v) {
		t.Errorf("with another tag of overlay ingress: %v, %d rules at %v", err, len(got.held.Listed), got.held.Revision)
	}
}

// TestTheFileStaysSmall: however many changes there are, they do not outgrow the list.
func TestTheFileStaysSmall(t *testing.T) {
	s := open2(t, t.TempDir())
	with := manyRules(300, 1)
	without := with.without(0)
	for i := range 2000 {
		v := []saved{with, without}[i%2]
		v.held.Revision.Counter = uint64(i)
		if err := s.save(v); err != nil {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(filepath.Join(s.dir, policiesFile)); err != nil || st.Size() > 160<<10 {
		t.Errorf("%v: %d bytes", err, st.Size())
	}
	if got, err := s.load(); err != nil || got.held.Revision.Counter != 1999 || len(got.held.Listed) != 299 {
		t.Errorf("%v: %d rules at %v", err, len(got.held.Listed), got.held.Revision)
	}
}

// TestKilledWhileAChangeWasWritten: wherever the file ends, it says what it said before the line that is not whole.
func TestKilledWhileAChangeWasWritten(t *testing.T) {
	text := changed(t, t.TempDir(), 3)
	list := len(changed(t, t.TempDir(), 0))
	for end := list; end <= len(text); end++ {
		v, err := parseSaved(strings.NewReader(text[:end]))
		lines := strings.Count(text[list:end], "\n")
		if err != nil || v.held.Revision.Counter != uint64(1+lines) || len(v.held.Listed) != 10-lines {
			t.Fatalf("at %d of %d bytes: %v, %d rules at %v, want those of change %d", end, len(text), err, len(v.held.Listed), v.held.Revision, lines)
		}
	}
	for name, bad := range map[string]string{
		"a line that is none": text + "hello\n", "a change less": text[:list] + text[list+strings.Index(text[list:], "\n")+1:],
		"another port": text[:list] + strings.Replace(text[list:], `"3"`, `"4"`, 1), "a rule of the list": text + text[strings.Index(text, "\n")+1:list],
	} {
		if v, err := parseSaved(strings.NewReader(bad)); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %+v, %v, want it refused", name, v, err)
		}
	}
}

// TestAFileThatCannotBeAddedToIsWrittenAnew: what another life wrote, or a write that failed, is not added to.
func TestAFileThatCannotBeAddedToIsWrittenAnew(t *testing.T) {
	dir := t.TempDir()
	s := open2(t, dir)
	path := filepath.Join(dir, policiesFile)
	v := manyRules(50, 1)
	if err := s.save(v); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func() error{
		"it is gone": func() error { return os.Remove(path) }, "it is another's": func() error { return os.WriteFile(path, []byte("half a li"), 0o600) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		v = v.without(3)
		if err := s.save(v); err != nil {
			t.Fatal(err)
		}
		if got, err := s.load(); err != nil || !reflect.DeepEqual(got, v) {
			t.Errorf("%s: %v, %d rules", name, err, len(got.held.Listed))
		}
	}
	if err := os.WriteFile(path, []byte("half a li"), 0o600); err != nil {
		t.Fatal(err)
	}
	again := &state{dir: dir}
	if err := again.save(v.without(4)); err != nil {
		t.Fatal(err)
	}
	if got, err := again.load(); err != nil || len(got.held.Listed) != 47 {
		t.Errorf("%v, %d rules", err, len(got.held.Listed))
	}
}
