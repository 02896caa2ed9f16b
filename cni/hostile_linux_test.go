package cni_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
	"golang.org/x/sys/unix"
)

// injected is the real plugin, still to be started in the host's namespace, with a system call that fails as strace(1) words it.
func (h *host) injected(fault, command, config string, env map[string]string) *exec.Cmd {
	return h.injectedInto("silk-cni", fault, command, config, env)
}

func (h *host) injectedInto(program, fault, command, config string, env map[string]string) *exec.Cmd {
	h.t.Helper()
	strace, err := exec.LookPath("strace")
	testkit.Require(h.t, "tools", err)
	dir, err := binary()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command("nsenter", "--net="+fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), h.ns.FD()), strace, "-f", "-qq", "-o", "/dev/null", "-e", "inject="+fault, filepath.Join(dir, program))
	cmd.Stdin = strings.NewReader(config)
	cmd.Env = []string{"CNI_COMMAND=" + command, "GOMAXPROCS=1"}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return cmd
}

// TestStaleDelSparesTheNextContainer: the second DEL of a container may come when its namespace's path is another's.
func TestStaleDelSparesTheNextContainer(t *testing.T) {
	h := newHost(t)
	store := filepath.Join(h.dir, "store.json")
	old, c := h.container("c1"), h.container("c2")
	h.add(old, "datastore", store)
	h.del(old, "datastore", store)
	h.add(c, "datastore", store)
	before := read(t, store)
	old.path = c.path
	h.del(old, "datastore", store)
	if a := h.run("CHECK", h.config("datastore", store), c.env()); a.code != 0 {
		t.Error(a.stdout)
	}
	if got := read(t, store); got != before {
		t.Errorf("store %s, want %s", got, before)
	}
	write(t, store, strings.ReplaceAll(before, "10.255.30.3", "10.255.30.99")) // nobody's: it goes with its handle
	h.del(old, "datastore", store)
	if got := read(t, store); got != "{}\n" {
		t.Errorf("store %s, want nothing", got)
	}
}

// TestTwoInterfacesInTheStore: earlier releases know one handle for a namespace. What goes last takes it away.
func TestTwoInterfacesInTheStore(t *testing.T) {
	h := newHost(t)
	store := filepath.Join(h.dir, "store.json")
	c := h.container("c1")
	h.add(c, "datastore", store)
	if a := h.run("ADD", h.config("datastore", store), c.env("CNI_IFNAME", "eth1")); a.code != 0 {
		t.Fatal(a.stdout)
	}
	h.del(c, "datastore", store)
	if got := read(t, store); !strings.Contains(got, "10.255.30.3") {
		t.Errorf("store %s, want the other interface's address", got)
	}
	if a := h.run("DEL", h.config("datastore", store), c.env("CNI_IFNAME", "eth1")); a.code != 0 || read(t, store) != "{}\n" {
		t.Errorf("%+v, store %s", a, read(t, store))
	}
}

// TestBrokenStoreOnAFullDisk: keeping it needs no room, and failing leaves nothing more each time.
func TestBrokenStoreOnAFullDisk(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	dir := filepath.Join(h.dir, "full")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k,nr_inodes=100"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	store := filepath.Join(dir, "store.json")
	write(t, store, "[]")
	os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 1<<20), 0o600) // as much as there is room for
	for range 3 {
		if code, text := h.run("ADD", h.config("datastore", store), c.env()).failure(t); code != 100 || !strings.Contains(text, "no space left") {
			t.Errorf("code %d %s", code, text)
		}
		h.del(c, "datastore", store)
	}
	h.clean()
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 3 {
		t.Errorf("files %v %v, want the store, a second name of it and the filler", files, err)
	}
	if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
		t.Fatal(err)
	}
	h.add(c, "datastore", store)
	if got := read(t, store); !strings.Contains(got, "netns-c1") {
		t.Error(got)
	}
}

// TestFailedAddLeavesTheStore: an ADD that fails after it has entered the container takes it out again.
func TestFailedAddLeavesTheStore(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	store := filepath.Join(h.dir, "store.json")
	h.add(c, "datastore", store) // what is made once is there from here on
	h.del(c, "datastore", store)
	cmd := h.injected("fsync:error=EIO:when=2", "ADD", h.config("datastore", store), c.env()) // of the directory, after the rename
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "write container metadata") {
		t.Fatalf("%v %s", err, out)
	}
	if got := read(t, store); got != "{}\n" {
		t.Errorf("store %s, want nothing", got)
	}
}

// TestHostileSubnets: whatever the daemon says, containers get no address that means something else.
func TestHostileSubnets(t *testing.T) {
	for _, subnet := range []string{"0.0.0.0/0", "0.0.0.0/8", "127.0.0.0/24", "169.254.0.0/24", "224.0.0.0/24", "255.255.255.0/24", "10.0.0.0/7"} {
		t.Run(strings.ReplaceAll(subnet, "/", "-"), func(t *testing.T) {
			h := newHost(t)
			h.reply = func() string { return fmt.Sprintf(`{"overlay_subnet":%q,"mtu":1450}`, subnet) }
			c := h.container("c1")
			if code, text := h.run("ADD", h.config(), c.env()).failure(t); code != 11 || !strings.Contains(text, subnet) {
				t.Errorf("code %d %s", code, text)
			}
			file := filepath.Join(h.dir, "subnet.env")
			write(t, file, "FLANNEL_SUBNET="+subnet+"\nFLANNEL_MTU=1450\n")
			if code, text := h.run("ADD", h.config("subnetFile", file), c.env()).failure(t); code != 11 || !strings.Contains(text, subnet) {
				t.Errorf("code %d %s", code, text)
			}
		})
	}
}

// TestInterfaceNamesThatAreNoText: a record could not hold them.
func TestInterfaceNamesThatAreNoText(t *testing.T) {
	h := newHost(t)
	c := h.container("c1")
	for _, name := range []string{"\xff\xfe", "eth%d", "a\x01"} {
		if code, text := h.run("ADD", h.config(), c.env("CNI_IFNAME", name)).failure(t); code != 4 {
			t.Errorf("%q: code %d %s", name, code, text)
		}
	}
	h.clean()
}

// TestBootIDThatCannotBeRead: not knowing the boot is no reason to take the records for an earlier one's.
func TestBootIDThatCannotBeRead(t *testing.T) {
	h := newHost(t)
	c1, c2 := h.container("c1"), h.container("c2")
	h.add(c1)
	for _, c := range []struct {
		command string
		c       container
	}{{"ADD", c2}, {"DEL", c1}} {
		cmd := h.injected("openat:error=ENOMEM:when=1", c.command, h.config(), c.c.env())
		cmd.Args = slices.Insert(cmd.Args, 3, "-P", "/proc/sys/kernel/random/boot_id")
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "find out which boot this is") {
			t.Errorf("%s: %v %s", c.command, err, out)
		}
	}
	if a := h.run("CHECK", h.config(), c1.env()); a.code != 0 {
		t.Errorf("the record is lost: %s", a.stdout)
	}
}

// TestStatusOfABadConfiguration: an ADD could not succeed, and STATUS says so with its own code.
func TestStatusOfABadConfiguration(t *testing.T) {
	h := newHost(t)
	for _, cfg := range []string{h.config("mtu", "many"), h.config("name", ""), h.config("name", "a/b"), h.config("policy", "perhaps")} {
		if code, text := h.run("STATUS", cfg, nil).failure(t); code != 50 {
			t.Errorf("code %d %s", code, text)
		}
	}
}

// TestStatusOfAReadOnlyDirectory: no address could be recorded.
func TestStatusOfAReadOnlyDirectory(t *testing.T) {
	h := newHost(t)
	dir := filepath.Join(h.dir, "endpoints")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	if code, text := h.run("STATUS", h.config(), nil).failure(t); code != 50 || !strings.Contains(text, "read-only") {
		t.Errorf("code %d %s", code, text)
	}
}
