package lab

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestAProcessOfSomebodyElseIsNoMember has another user write the lab's name into an environment. Root would enter the file
// systems that such a controller shows it, and start programs there.
func TestAProcessOfSomebodyElseIsNoMember(t *testing.T) {
	var err error
	if os.Geteuid() != 0 {
		err = errors.New("not run by root")
	}
	testkit.Require(t, "root", err)
	dir := t.TempDir()
	for _, uid := range []uint32{65534, 0} {
		cmd := exec.Command("sleep", "1000")
		cmd.Env, cmd.Dir = environ(dir, roleController, "/usr/bin"), "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		p, err := find(dir, roleController)
		if err != nil || (p != nil) != (uid == 0) {
			t.Errorf("a process of user %d is found: %v, %v", uid, p != nil, err)
		}
		if p != nil {
			p.close()
		}
		cmd.Process.Kill()
		cmd.Wait()
	}
}

func TestADirectoryOpenToAllIsClosed(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	_, unlock, err := claim(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("others may enter the lab's directory, and connect to its socket: %v, %v", st.Mode(), err)
	}
}

func TestUpThatCannotWriteLeavesNothing(t *testing.T) {
	programs, dir := t.TempDir(), filepath.Join(t.TempDir(), "lab")
	for _, p := range []string{"silk", "silk-controller", "silk-daemon", "silk-cni", "silk-teardown", "policy-server", "vxlan-policy-agent"} {
		if err := os.WriteFile(filepath.Join(programs, p), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, journalFile+".new"), 0o700); err != nil { // as good as a full disk
		t.Fatal(err)
	}
	if _, err := Up(t.Context(), Options{Dir: dir, Programs: programs}); err == nil {
		t.Error("up without a journal")
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is left, and is no lab that can be taken down: %v", err)
	}
}

// TestASupervisorThatEndsIsUnavailable: a command that met it may be tried again, whether its request was still sent or not.
func TestASupervisorThatEndsIsUnavailable(t *testing.T) {
	dir := t.TempDir()
	if err := newJournal(Options{Name: "lab", Hosts: 1}).save(dir); err != nil {
		t.Fatal(err)
	}
	ln, err := listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	w, err := connect(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	c, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := ended(w.send(message{Op: opStatus})); !errors.Is(err, fault.Unavailable) || !errors.Is(err, io.EOF) {
		t.Errorf("sending: %v, want fault.Unavailable and io.EOF", err)
	}
	if _, err := w.answer(); !errors.Is(err, fault.Unavailable) || !errors.Is(err, io.EOF) {
		t.Errorf("reading: %v, want fault.Unavailable and io.EOF", err)
	}
}
