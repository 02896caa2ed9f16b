package policyagent

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"testing"
)

// TestFlowFile: a file that is renamed or removed is made anew, what a disk does not take is counted, and nobody waits for it.
func TestFlowFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "flows.log")
	f := newFlowFile(path, quiet)
	content := func(name string) string { b, _ := os.ReadFile(filepath.Join(dir, name)); return string(b) }
	write := func(s string) {
		f.add([]byte(s))
		f.mu.Lock()
		b := f.lines
		f.lines = nil
		f.mu.Unlock()
		f.write(b, 1)
	}
	write("one\n")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	write("two\n")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f.write(nil, 0)
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	write("three\n")
	if content("flows.log.1") != "one\n" || content("flows.log") != "three\n" {
		t.Errorf("files: %q, %q", content("flows.log.1"), content("flows.log"))
	}
	if err := os.Rename(path, path+".2"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	write("four\n")
	if _, lost := f.figures(); lost != 1 || f.failure() == nil {
		t.Errorf("%d lost, %v", lost, f.failure())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	write("five\n")
	if content("flows.log") != "five\n" || f.failure() != nil {
		t.Errorf("after the failure: %q, %v", content("flows.log"), f.failure())
	}
	line := bytes.Repeat([]byte("x"), 1<<20)
	for range 10 { // nobody writes
		f.add(line)
	}
	if _, lost := f.figures(); lost != 1+2 {
		t.Errorf("%d lines lost, want 3", lost)
	}
}

// TestFlowStream: who asks gets what is kept, filtered, and with follow what comes.
func TestFlowStream(t *testing.T) {
	l := newLogged(t)
	l.api.listen(8080)
	l.web.udp(l.api.address, 9011, 1)
	l.lines(1)
	ask := func(query string) *json.Decoder {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+l.cfg.debugAddress()+"/flows?"+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		if resp.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s", query, resp.Status)
		}
		return json.NewDecoder(resp.Body)
	}
	count := func(query string) (n int) {
		for d := ask(query); d.More(); n++ {
			var x flowLine
			if err := d.Decode(&x); err != nil {
				t.Fatal(err)
			}
		}
		return n
	}
	for query, want := range map[string]int{"": 1, "denied=true": 1, "group=web": 1, "group=other": 0, "since=2100-01-01T00:00:00Z": 0} {
		if got := count(query); got != want {
			t.Errorf("%s: %d records, want %d", query, got, want)
		}
	}
	following := ask("follow=true&ended=true")
	for range 2 {
		l.web.reaches(l.api, 8081)
		var x flowLine
		if err := following.Decode(&x); err != nil || x.Verdict != "denied" {
			t.Fatalf("%+v, %v", x, err)
		}
	}
	if status, _ := l.get(l.cfg.debugAddress(), "/flows?since=yesterday"); status != http.StatusBadRequest {
		t.Errorf("a time that cannot be read: %d", status)
	}
}
