package cni_test

import (
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
)

// TestAddThatWaitedAsksAgain: while an ADD waits for its turn, the host may lose its subnet to another host.
func TestAddThatWaitedAsksAgain(t *testing.T) {
	for name, later := range map[string]string{
		"another subnet": strings.ReplaceAll(ready, "10.255.30.", "10.255.40."),
		"fenced":         `{"status":"fenced","reason":"lost"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			var asked atomic.Int32
			h.reply = func() string {
				if asked.Add(1) == 1 {
					return ready
				}
				return later
			}
			dir := filepath.Join(h.dir, "endpoints")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			lock, err := os.Create(filepath.Join(dir, ".lock"))
			if err != nil {
				t.Fatal(err)
			}
			defer lock.Close()
			if ok, err := kernel.TryFlock(lock); !ok {
				t.Fatal(err)
			}
			c := h.container("c1")
			done := make(chan answer)
			go func() { done <- h.run("ADD", h.config(), c.env()) }()
			<-time.After(3500 * time.Millisecond) // the daemon's word counts for 3 s
			lock.Close()
			a := <-done
			if name == "fenced" {
				if code, text := a.failure(t); code != 11 || !strings.Contains(text, "fenced") {
					t.Errorf("code %d %s", code, text)
				}
				h.clean()
				return
			}
			if got := a.result(t).IPs[0].Address; got != "10.255.40.2/32" {
				t.Errorf("address %s, want one of the subnet of now", got)
			}
		})
	}
}
