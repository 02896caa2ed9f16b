package lab

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
)

func FuzzParseJournal(f *testing.F) {
	f.Add([]byte(`{"version":1,"name":"lab","hosts":[{"name":"host1","index":1}],"containers":[{"name":"c1","host":"host1"}]}`))
	f.Add([]byte(`{"version":1,"hosts":[{"name":"host1","index":1},{"name":"host2","index":1}]}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1,"containers":[{"name":"c1","host":"nowhere"}]}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		j, err := parseJournal(b)
		if err != nil {
			if !errors.Is(err, fault.Invalid) {
				t.Fatalf("%v is not fault.Invalid", err)
			}
			return
		}
		for _, h := range j.Hosts {
			if !underlay.Contains(address(h.Index)) || address(h.Index) == address(0) {
				t.Fatalf("host %q has index %d", h.Name, h.Index)
			}
		}
		for _, c := range j.Containers {
			if j.host(c.Host) == nil || checkName(c.Name) != nil {
				t.Fatalf("container %q on %q", c.Name, c.Host)
			}
		}
	})
}

func FuzzParseRole(f *testing.F) {
	f.Add([]byte("PATH=/bin\x00SILK_LAB_MEMBER=/run/silk-lab/lab\x00SILK_LAB_ROLE=keeper\x00"))
	f.Add([]byte("SILK_LAB_MEMBER=/run/silk-lab/lab2\x00"))
	f.Add([]byte("XSILK_LAB_MEMBER=/run/silk-lab/lab"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, ok := parseRole(b, "/run/silk-lab/lab")
		if want := slices.Contains(strings.Split(string(b), "\x00"), memberVar+"=/run/silk-lab/lab"); ok && !want {
			t.Fatalf("%q counts as a member", b)
		}
	})
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("42 (silk) S 1 42 42 0 -1"))
	f.Add([]byte("42 (a) Z 7 (b) R 1 42"))
	f.Add([]byte("42 (silk) Z 1"))
	f.Add([]byte("42 ("))
	f.Fuzz(func(t *testing.T, b []byte) {
		if ppid, alive := parseStat(b); alive && !strings.Contains(string(b), ")") {
			t.Fatalf("%q: parent %d", b, ppid)
		}
	})
}

func TestParseStatReadsPastTheName(t *testing.T) {
	for _, c := range []struct {
		stat  string
		ppid  int
		alive bool
	}{
		{"42 (silk) S 7 1", 7, true}, {"42 (x) R 1) Z) S 7 1", 7, true}, {"42 (silk) Z 7 1", 7, false}, {"42 (silk) S", 0, false}, {"", 0, false},
	} {
		if ppid, alive := parseStat([]byte(c.stat)); ppid != c.ppid || alive != c.alive {
			t.Errorf("%q: parent %d, alive %v, want %d, %v", c.stat, ppid, alive, c.ppid, c.alive)
		}
	}
}

func FuzzParseRequest(f *testing.F) {
	f.Add([]byte(`{"op":"exec","name":"host1","command":["true"]}`))
	f.Add([]byte(`{"op":"exec"}`))
	f.Add([]byte(`{"op":"add","host":"-"}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseRequest(b)
		if err != nil && !errors.Is(err, fault.Invalid) {
			t.Fatalf("%v is not fault.Invalid", err)
		}
		if err == nil && m.Op == opExec && len(m.Command) == 0 {
			t.Fatal("a command that is none")
		}
	})
}

func TestWirePassesFilesAndRefusesEndlessLines(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30)) // longer than a socket's address may be
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accepted := make(chan *net.UnixConn, 1)
	go func() {
		c, err := ln.AcceptUnix()
		if err != nil {
			t.Error(err)
		}
		accepted <- c
	}()
	client, err := connect(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer client.close()
	server := &wire{c: <-accepted}
	defer server.close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := client.send(message{Op: opPing}, w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if b, err := server.line(lineLimit); err != nil || string(b) != `{"op":"ping"}` || len(server.files) != 1 {
		t.Fatalf("line %q with %d files, %v", b, len(server.files), err)
	}
	server.files[0].WriteString("through")
	server.files[0].Close()
	server.files = nil
	if b, err := io.ReadAll(r); err != nil || string(b) != "through" {
		t.Errorf("read %q, %v", b, err)
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		client.c.Write([]byte(strings.Repeat("x", lineLimit+1<<18)))
	}()
	if _, err := server.line(lineLimit); !errors.Is(err, fault.Invalid) {
		t.Errorf("a line without end: %v, want fault.Invalid", err)
	}
	server.close()
	<-sent
}

func TestInstancesHaveNumbersOfTheirOwn(t *testing.T) {
	j := newJournal(Options{Hosts: 2, Containers: 3})
	got := map[string]int{}
	for _, c := range j.Containers {
		got[fmt.Sprintf("%d.%s", c.Index, c.Group)]++
	}
	if want := map[string]int{"0.web": 1, "1.web": 1, "2.web": 1, "0.api": 1, "1.api": 1, "2.api": 1}; !maps.Equal(got, want) {
		t.Errorf("instances are %v, want %v", got, want)
	}
	j.Containers = without(j.Containers, func(c containerEntry) bool { return c.Group == "web" && c.Index == 1 })
	if web, shop := j.freeIndexOf("web"), j.freeIndexOf("shop"); web != 1 || shop != 0 {
		t.Errorf("the next of web is %d and that of shop %d, want 1 and 0", web, shop)
	}
}

func TestNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"web": true, "c1": true, "host-1": true, "": false, "1c": false, "../x": false, "a/b": false, "Web": false, "controller": false, "underlay": false, "control": false,
		"sixteen-letters-": false, "lo": false, "all": false, "default": false, "eth0": true,
	} {
		if err := checkName(name); (err == nil) != ok {
			t.Errorf("%q: %v, want ok %v", name, err, ok)
		}
	}
}

func TestADirectoryWithOtherThingsIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "thesis.txt"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := claim(t.Context(), dir); !errors.Is(err, fault.Invalid) {
		t.Errorf("claim: %v, want fault.Invalid", err)
	}
	if _, err := Open(dir); !errors.Is(err, fault.NotFound) {
		t.Errorf("open: %v, want fault.NotFound", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "thesis.txt")); err != nil {
		t.Error(err)
	}
}
