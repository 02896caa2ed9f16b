package tlsproxy

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// leaveFiles leaves this process so many descriptors until what it returns is called.
func leaveFiles(t *testing.T, n int) func() {
	t.Helper()
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	few := was
	few.Cur = uint64(len(open) + 64)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &few); err != nil {
		t.Fatal(err)
	}
	var taken []int
	for {
		fd, err := syscall.Dup(0)
		if err != nil {
			break
		}
		taken = append(taken, fd)
	}
	for range n {
		syscall.Close(taken[len(taken)-1])
		taken = taken[:len(taken)-1]
	}
	return func() {
		for _, fd := range taken {
			syscall.Close(fd)
		}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &was); err != nil {
			t.Error(err)
		}
	}
}

// settle waits until changes of a file could be told by its times.
func settle(t *testing.T, path string) {
	t.Helper()
	testkit.Until(t, patience, "its times are not old enough", func() bool {
		info, err := os.Stat(path)
		return err == nil && stamps{stampOf(info), stampOf(info)}.settled(time.Now())
	})
}

// TestNoDescriptorIsNoVerdict: what could not be opened in a flood is read afterwards, though it has not changed.
func TestNoDescriptorIsNoVerdict(t *testing.T) {
	ca := newIssuer(t)
	p := ca.issue(t, netip.MustParseAddr("10.255.30.2"), "good")
	base := t.TempDir()
	if err := os.Mkdir(filepath.Join(base, "c"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"instance.crt": p.cert, "instance.key": p.key} {
		if err := os.WriteFile(filepath.Join(base, "c", name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cfg := DefaultConfig()
	cfg.CertificateDirectory, cfg.ClientCAFile = base+"/{container}", filepath.Join(base, "ca.crt")
	authorities, err := os.ReadFile(ca.file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfg.ClientCAFile, authorities, 0o600); err != nil {
		t.Fatal(err)
	}
	settle(t, cfg.ClientCAFile)
	r := endpoint.Record{Key: endpoint.Key{Container: "c"}}
	for n := range 4 {
		d, err := newDirectory(&cfg, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		enough := leaveFiles(t, n)
		_, failed := d.show(r)
		_, failedToo := d.trust()
		enough()
		if n == 0 && (!errors.Is(failed, syscall.EMFILE) || !errors.Is(failedToo, syscall.EMFILE)) {
			t.Errorf("without a descriptor: %v, %v", failed, failedToo)
		}
		if _, err := d.show(r); err != nil {
			t.Errorf("%d descriptors had been left: %v", n, err)
		}
		if _, err := d.trust(); err != nil {
			t.Errorf("%d descriptors had been left: authorities: %v", n, err)
		}
	}
}

// TestAuthoritiesThatCannotBeUsedAreToldOf, once, while the last good ones are trusted, and a pipe keeps nobody waiting.
func TestAuthoritiesThatCannotBeUsedAreToldOf(t *testing.T) {
	ca := newIssuer(t)
	good, err := os.ReadFile(ca.file)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	var log logged
	x := trusted{path: path, log: slog.New(slog.NewTextHandler(&log, nil))}
	was, err := x.bundle()
	if err != nil {
		t.Fatal(err)
	}
	for what, do := range map[string]func() error{
		"half":    func() error { return os.WriteFile(path, good[:len(good)/2], 0o600) },
		"nothing": func() error { return nil },
		"a pipe":  func() error { return syscall.Mkfifo(path, 0o600) },
	} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if err := do(); err != nil {
			t.Fatal(err)
		}
		before := len(log.String())
		for range 3 {
			if b, err := x.bundle(); err != nil || !b.Equal(was) {
				t.Errorf("%s: %v, %v", what, b, err)
			}
		}
		if said := log.String()[before:]; strings.Count(said, "cannot be used") != 1 {
			t.Errorf("%s: the log says %q", what, said)
		}
	}
}
