package policyagent

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/durable"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/revision"
)

func stateRule(from, to identity.Group, tags [2]identity.Tag, p policy.Protocol, ports policy.Ports) policy.Rule {
	return policy.Rule{Policy: policy.Policy{Source: from, Destination: to, Protocol: p, Ports: ports}, SourceTag: tags[0], DestinationTag: tags[1]}
}

func someState() saved {
	return saved{router: 9, held: policy.HeldState{
		Revision: revision.Revision{Epoch: "e", Counter: 1 << 60}, Groups: []identity.Group{"a", "b"},
		Listed: []policy.Rule{stateRule("a", "b", [2]identity.Tag{1, 2}, policy.TCP, policy.Ports{First: 80, Last: 80})},
		Absent: []policy.HeldRule{{
			Rule:  stateRule("\"<é>", "b", [2]identity.Tag{0xffff, 2}, policy.UDP, policy.Ports{First: 1, Last: 65535}),
			Until: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
		}},
	}}
}

func open2(t *testing.T, dir string) *state {
	t.Helper()
	s, unlock, err := openState(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unlock() })
	return s
}

func TestStateComesBackAsItWas(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	s := open2(t, dir)
	if v, err := s.load(); err != nil || !reflect.DeepEqual(v, saved{}) {
		t.Errorf("nothing saved: %+v, %v", v, err)
	}
	want := someState()
	if err := s.save(want); err != nil {
		t.Fatal(err)
	}
	if got, err := s.load(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v\nwant %+v", got, err, want)
	}
	for _, p := range []string{dir, filepath.Join(dir, policiesFile)} {
		if st, err := os.Stat(p); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v, want it for its owner only", p, st.Mode(), err)
		}
	}
}

func TestAStateThatIsNotWholeIsNotUsed(t *testing.T) {
	var b bytes.Buffer
	if _, err := writeSaved(&b, someState()); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for name, bad := range map[string]string{
		"empty": "", "cut in a line": text[:len(text)-9], "a line less": text[:strings.LastIndex(strings.TrimSpace(text), "\n")],
		"a changed port": strings.Replace(text, `"80"`, `"81"`, 1), "a changed tag": strings.Replace(text, `"0001"`, `"0003"`, 1),
		"a line twice": text + text[strings.Index(text, "\n")+1:strings.LastIndex(strings.TrimSpace(text), "\n")] + "\n", "no state at all": "hello\n",
	} {
		if v, err := parseSaved(strings.NewReader(bad)); !errors.Is(err, fault.Invalid) {
			t.Errorf("%s: %+v, %v, want it refused", name, v, err)
		}
	}
}

func TestWhatAKilledAgentWasWritingIsRemoved(t *testing.T) {
	dir := t.TempDir()
	s, unlock, err := openState(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	want := someState()
	if err := s.save(want); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, durable.Temp+"123"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	s = open2(t, dir)
	if got, err := s.load(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, durable.Temp+"*")); len(left) > 0 {
		t.Errorf("%q is left", left)
	}
}

func FuzzState(f *testing.F) {
	var b bytes.Buffer
	if _, err := writeSaved(&b, someState()); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add([]byte(`{"revision":"","groups":null,"count":0,"sum":"0000000000000000"}`))
	f.Add([]byte(changed(f, f.TempDir(), 3)))
	f.Fuzz(func(t *testing.T, in []byte) {
		v, err := parseSaved(bytes.NewReader(in))
		if err != nil {
			return
		}
		var out bytes.Buffer
		if _, err := writeSaved(&out, v); err != nil {
			t.Fatal(err)
		}
		again, err := parseSaved(&out)
		if err != nil || len(again.held.Listed) != len(v.held.Listed) || len(again.held.Absent) != len(v.held.Absent) {
			t.Errorf("what was read cannot be written and read: %v", err)
		}
		v.held.Restore(time.Minute).Keep(time.Now())
	})
}

func FuzzStore(f *testing.F) {
	f.Add([]byte(`{"c1":{"handle":"c1","ip":"10.255.1.2","metadata":{"policy_group_id":"a","ports":"8080, 2222"}},"c2":7,"c3":{"ip":"x"}}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, in []byte) {
		entries, err := parseStore(in)
		if err != nil {
			return
		}
		for id, e := range entries {
			if c, err := e.container(id); err == nil && (len(c.endpoints) != 1 || c.endpoints[0].Device == "") {
				t.Errorf("%q is %+v", id, c)
			}
			new(hosted).ports(id, e.Metadata)
		}
	})
}
