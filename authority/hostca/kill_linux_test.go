package hostca_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/authority/authorityhttp"
	"code.cloudfoundry.org/silk/authority/hostca"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestMain is also the process that tests kill: it makes one leaf and ends.
func TestMain(m *testing.M) {
	if dir := os.Getenv("HOSTCA_DIR"); dir != "" {
		if err := oneLeaf(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func oneLeaf(dir string) error {
	tc, err := service.Certificates{CA: os.Getenv("HOSTCA_CA"), Cert: os.Getenv("HOSTCA_CERT"), Key: os.Getenv("HOSTCA_KEY")}.Client()
	if err != nil {
		return err
	}
	c := authorityhttp.NewClient(os.Getenv("HOSTCA_URL"), tc, authorityhttp.ClientOptions{})
	defer c.Close()
	i, err := hostca.Open(hostca.Config{Dir: dir, Underlay: own, Client: c, Log: discard})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	_, err = i.Leaf(ctx, spec) // what it signs with has been saved
	cancel()
	return errors.Join(err, <-done)
}

// TestKilledAtEverySystemCall kills a process at each call by which it changes files; the next one issues all the same, what containers read is
// whole whenever it is there, and nothing is left of what was being written.
func TestKilledAtEverySystemCall(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a hundred processes")
	}
	strace, err := exec.LookPath("strace")
	testkit.Require(t, "tools", err)
	f := newFleet(t)
	pair := f.pair(t, "host", own)
	run := func(url, dir string, inject ...string) ([]byte, error) {
		cmd := exec.Command(os.Args[0])
		if inject != nil {
			cmd = exec.Command(strace, append([]string{"-f", "-qq", "-o", "/dev/null"}, append(inject, os.Args[0])...)...)
		}
		cmd.Env = append(os.Environ(), "HOSTCA_DIR="+dir, "HOSTCA_URL="+url, "HOSTCA_CA="+pair.CA, "HOSTCA_CERT="+pair.Cert, "HOSTCA_KEY="+pair.Key, "GOMAXPROCS=1")
		return cmd.CombinedOutput()
	}
	kills := 0
	for _, call := range []string{"mkdirat", "fchmodat", "openat", "fchmod", "fsync", "renameat", "write"} {
		for n, killed := 1, true; killed && n < 40; n++ {
			dir := filepath.Join(t.TempDir(), "tls")
			c := f.controller(t, "") // one that has not been asked by this host before
			out, err := run(c.URL, dir, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n))
			if killed = err != nil && len(out) == 0; killed {
				kills++
			} else if err != nil {
				t.Fatalf("%s %d: %v: %s", call, n, err, out)
			}
			if _, err := os.Stat(filepath.Join(dir, hostca.RootsFile)); err == nil && !rootsOf(t, dir).Equal(f.root.Bundle()) {
				t.Errorf("%s %d: other roots", call, n)
			}
			if out, err := run(c.URL, dir); err != nil {
				t.Fatalf("%s %d: the next one: %v: %s", call, n, err, out)
			}
			left, err := filepath.Glob(filepath.Join(dir, "*"))
			more, err2 := filepath.Glob(filepath.Join(dir, "*", "*"))
			hidden, err3 := filepath.Glob(filepath.Join(dir, ".*"))
			if err := errors.Join(err, err2, err3); err != nil {
				t.Fatal(err)
			}
			if got := strings.ReplaceAll(strings.Join(append(append(left, more...), hidden...), " "), dir+"/", ""); got != "intermediate.json roots roots/roots.pem" {
				t.Errorf("%s %d: left %s", call, n, got)
			}
			if !rootsOf(t, dir).Equal(f.root.Bundle()) {
				t.Errorf("%s %d: other roots", call, n)
			}
			c.Close()
		}
	}
	if kills < 15 {
		t.Errorf("killed %d times only: the test does not tell much", kills)
	}
	t.Logf("killed %d times", kills)
}
