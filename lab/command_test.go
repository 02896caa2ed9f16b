package lab_test

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/lab"
)

// TestCommands is the lab as people use it: by the program silk.
func TestCommands(t *testing.T) {
	t.Parallel()
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "lab")
	silk := func(status int, args ...string) string {
		t.Helper()
		out, err := exec.Command(filepath.Join(programs, "silk"), append([]string{"lab", "--dir", dir}, args...)...).CombinedOutput()
		code := 0
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			code = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		if code != status {
			t.Errorf("silk lab %q ended with %d, want %d:\n%s", args, code, status, out)
		}
		return string(out)
	}
	expect := func(out string, parts ...string) {
		t.Helper()
		for _, p := range parts {
			if !strings.Contains(out, p) {
				t.Errorf("no %q in\n%s", p, out)
			}
		}
	}
	expect(silk(1, "status"), "no lab in", "silk lab up")
	expect(silk(0, "down"), "no lab in")
	expect(silk(1, "up", "--hosts", "0"), "expected to be 1 to 100")
	t.Cleanup(func() { silk(0, "down") })
	expect(silk(0, "up", "--hosts", "2", "--containers", "1", "--policy", "none"), "is up: 2 hosts, 2 containers", "2 of 2 connections work", "try next", "exec c1 --")
	expect(silk(0, "up"), "was there already")
	expect(silk(0, "up", "--hosts", "5"), "was there already", "2 hosts", "--hosts is for a new lab")
	expect(silk(0, "add", "web", "--host", "host2"))
	expect(silk(1, "add", "web"), `"web" exists already`)
	expect(silk(1, "add", "Web"), "lower-case")
	expect(silk(0, "status"), "web 10.255.", "6 of 6 connections work")
	var s lab.Status
	if err := json.Unmarshal([]byte(silk(0, "status", "--json")), &s); err != nil || len(s.Containers) != 3 || !s.Whole() {
		t.Errorf("status as JSON: %v, %+v", err, s)
	}
	expect(silk(0, "exec", "c1", "--", "sh", "-c", "echo in $0; cat /proc/net/dev", "it"), "in it", "eth0:")
	silk(3, "exec", "host1", "sh", "-c", "exit 3")
	expect(silk(0, "exec", "host1", "--", "silk", "status"), "state    ready", "lease    10.255.")
	expect(silk(0, "exec", "host1", "--", "silk", "leases", "--config", filepath.Join(dir, "nodes/host1/daemon.json")), "10.0.0.11", "10.0.0.12")
	expect(silk(1, "kill", "nothing"), "expected controller")
	silk(0, "kill", "host2/silk-daemon")
	silk(0, "partition", "host1")
	expect(silk(0, "status"), "partitioned", "FAIL")
	silk(0, "heal", "host1")
	silk(0, "rm", "web")
	expect(silk(1, "rm", "web"), "no host or container")
	expect(silk(0, "add-host"), "host3")
	silk(0, "rm", "host3")
	expect(silk(0, "down"), "nothing of it is left")
}

// TestMachinesOfOtherKinds builds labs on machines that lack /etc/cni or /etc/resolv.conf, or whose resolv.conf is systemd-resolved's below /run, and
// leaves them so.
func TestMachinesOfOtherKinds(t *testing.T) {
	t.Parallel()
	needRoot(t)
	for name, c := range map[string]struct{ make, still string }{
		"no CNI":           {"rm -rf /etc/cni", "test ! -e /etc/cni"},
		"no resolver":      {"rm -f /etc/resolv.conf; mkdir -p /etc/cni", "test ! -e /etc/resolv.conf"},
		"a link":           {"mkdir -p /etc/cni /run/x; echo nameserver 192.0.2.1 >/run/x/stub.conf; ln -sf ../run/x/stub.conf /etc/resolv.conf", "grep 192.0.2.1 /etc/resolv.conf"},
		"a link to nobody": {"mkdir -p /etc/cni; ln -sf /nowhere/stub.conf /etc/resolv.conf", "test -L /etc/resolv.conf; test ! -e /nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			script := `
				mkdir upper work
				mount -t overlay overlay -o lowerdir=/etc,upperdir=$PWD/upper,workdir=$PWD/work /etc
				mount -t tmpfs tmpfs /run
				umount /etc/resolv.conf 2>/dev/null || true
				` + c.make + `
				trap '"$SILK" lab --dir $PWD/lab down' EXIT
				"$SILK" lab --dir $PWD/lab up --hosts 2 --containers 1 --policy none
				"$SILK" lab --dir $PWD/lab exec host1 -- sh -ec 'ls /etc/cni/net.d; echo $(wc -c </etc/resolv.conf) bytes of resolver; echo mine >/etc/cni/net.d/mine'
				test ! -e /etc/cni/net.d/mine
				` + c.still
			cmd := exec.Command("unshare", "--mount", "sh", "-ec", script)
			cmd.Dir = t.TempDir()
			cmd.Env = append(os.Environ(), "SILK="+filepath.Join(programs, "silk"))
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "2 of 2 connections work") || !strings.Contains(string(out), "10-silk.conflist\n0 bytes of resolver\n") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
