package garden_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lab"
)

// The driver does what Garden's server does: it makes containers (a process each, in a network namespace of its own), runs the networker for
// them as the server runs it, and ends them. It is this test's own program, started again on a host of a lab.
const driverArg = "garden-driver"

// driver is what the program gets as its second argument.
type driver struct {
	Programs string
	Dir      string // for its files
	Count    int
	AtOnce   int

	mu       sync.Mutex
	problems []string
	killed   int
	took     time.Duration // of the fastest up
}

func driverMain(args []string) int {
	d := new(driver)
	err := json.Unmarshal([]byte(args[0]), d)
	if err == nil {
		err = d.drive()
	}
	if err != nil {
		d.wrong("%v", err)
	}
	for _, p := range d.problems {
		fmt.Println(p)
	}
	if len(d.problems) > 0 {
		return 1
	}
	fmt.Printf("%d containers, %d times killed\n", d.Count, d.killed)
	return 0
}

func (d *driver) wrong(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.problems) < 10 {
		d.problems = append(d.problems, fmt.Sprintf(format, args...))
	}
}

// box is one container.
type box struct {
	handle  string
	init    *exec.Cmd
	ns      *os.File
	byFD    bool // Garden gives the namespace itself, not a process
	netin   string
	up      bool
	address string
	ports   []int
}

func (d *driver) drive() error {
	adapter := filepath.Join(d.Dir, "adapter.json")
	b, err := json.Marshal(map[string]any{
		"cni_plugin_dir": d.Programs, "cni_config_dir": "/etc/cni/net.d", "bind_mount_dir": filepath.Join(d.Dir, "netns"), "state_file": filepath.Join(d.Dir, "ports.json"),
		"start_port": 61000, "total_ports": 5000, "log_prefix": "cfnetworking", "iptables_lock_file": filepath.Join(d.Dir, "lock"), "proxy_port": 15001, "proxy_uid": 0,
		"proxy_redirect_cidr": "10.127.0.0/16", "cni_cache_dir": filepath.Join(d.Dir, "cache"),
	})
	if err == nil {
		err = os.WriteFile(adapter, b, 0o600)
	}
	if err != nil {
		return err
	}
	first := &box{handle: "first", netin: `,"netin":[{"host_port":0,"container_port":8080}]`} // what stays on a host is there from here on
	if err := first.start(); err != nil {
		return err
	}
	for range 3 {
		start := time.Now()
		if err := d.up(first, 0); err != nil {
			return err
		}
		if took := time.Since(start); d.took == 0 || took < d.took {
			d.took = took
		}
		if err := d.down(first, 0); err != nil {
			return err
		}
	}
	first.stop()
	before, err := d.dump()
	if err != nil {
		return err
	}
	boxes := make([]*box, d.Count)
	d.each(boxes, func(i int) { boxes[i] = d.live(i) })
	d.judge(boxes)
	d.each(boxes, func(i int) { d.die(i, boxes[i]) })
	after, err := d.dump()
	if err == nil && before != after {
		err = fmt.Errorf("the host is another:\n%s", difference(before, after))
	}
	return err
}

// difference returns the lines that only one of two texts has.
func difference(before, after string) string {
	count := map[string]int{}
	for line := range strings.Lines(after) {
		count[line]++
	}
	var out strings.Builder
	for line := range strings.Lines(before) {
		if count[line]--; count[line] < 0 {
			out.WriteString("- " + line)
		}
	}
	for line := range strings.Lines(after) {
		if count[line] > 0 {
			count[line]--
			out.WriteString("+ " + line)
		}
	}
	return out.String()
}

// each works on all boxes, some at once.
func (d *driver) each(boxes []*box, do func(int)) {
	var wg sync.WaitGroup
	next := make(chan int)
	for range d.AtOnce {
		wg.Go(func() {
			for i := range next {
				do(i)
			}
		})
	}
	for i := range boxes {
		next <- i
	}
	close(next)
	wg.Wait()
}

// start makes the container's first process.
func (b *box) start() error {
	b.init = exec.Command("sleep", "3600")
	b.init.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: 0}
	if err := b.init.Start(); err != nil {
		return err
	}
	var err error
	b.ns, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", b.init.Process.Pid))
	return err
}

func (b *box) stop() {
	b.init.Process.Kill()
	b.init.Wait()
	b.ns.Close()
}

// run runs the networker as Garden does, and kills it after a while if that is not 0.
func (d *driver) run(b *box, action, stdin string, kill time.Duration) (stdout string, killed bool, err error) {
	cmd := exec.Command(filepath.Join(d.Programs, "garden-external-networker"), "--configFile", filepath.Join(d.Dir, "adapter.json"), "--action", action, "--handle", b.handle)
	cmd.Stdin = strings.NewReader(stdin)
	if b.byFD && action == "up" {
		cmd.ExtraFiles = []*os.File{b.ns}
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		return "", false, err
	}
	if kill > 0 {
		t := time.AfterFunc(kill, func() { cmd.Process.Kill() })
		defer t.Stop()
	}
	if err := cmd.Wait(); err != nil {
		if s := cmd.ProcessState.Sys().(syscall.WaitStatus); s.Signaled() && kill > 0 {
			return "", true, nil
		}
		return "", false, fmt.Errorf("%s %s: %w: %s", action, b.handle, err, errs.String())
	}
	return out.String(), false, nil
}

// up is Garden's creation of a container.
func (d *driver) up(b *box, kill time.Duration) error {
	pid := b.init.Process.Pid
	if b.byFD {
		pid = 0
	}
	in := fmt.Sprintf(`{"Pid":%d,"Properties":{"policy_group_id":"app-%s","space_id":"s","org_id":"o","container_workload":"app","ports":"8080","log_config":"{\"guid\":\"g\"}"}`, pid, b.handle)
	in += `,"netout_rules":[{"protocol":1,"networks":[{"start":"10.0.0.0","end":"10.0.0.255"}],"ports":[{"start":80,"end":80}],"log":false}]` + b.netin + "}"
	out, killed, err := d.run(b, "up", in, kill)
	if err != nil || killed {
		if killed {
			d.mu.Lock()
			d.killed++
			d.mu.Unlock()
		}
		return err
	}
	var o output
	if err := json.Unmarshal([]byte(out), &o); err != nil {
		return fmt.Errorf("up %s: %w: %s", b.handle, err, out)
	}
	var mapped []struct{ HostPort, ContainerPort int }
	if err := json.Unmarshal([]byte(o.Properties["garden.network.mapped-ports"]), &mapped); err != nil {
		return fmt.Errorf("up %s: %w", b.handle, err)
	}
	for _, m := range mapped {
		b.ports = append(b.ports, m.HostPort)
	}
	b.up, b.address = true, o.Properties["garden.network.container-ip"]
	return nil
}

func (d *driver) down(b *box, kill time.Duration) error {
	out, killed, err := d.run(b, "down", "null", kill)
	if err == nil && out != "" {
		err = fmt.Errorf("down %s says %q", b.handle, out)
	}
	if killed {
		d.mu.Lock()
		d.killed++
		d.mu.Unlock()
	}
	return err
}

// live makes container i. Of some the networker is killed.
func (d *driver) live(i int) *box {
	b := &box{handle: fmt.Sprintf("%08x-0000-4000-8000-%04x", rand.Uint32(), i), byFD: i%2 == 0}
	if i%4 != 3 {
		b.netin = `,"netin":[{"host_port":0,"container_port":8080},{"host_port":0,"container_port":2222}]`
	}
	if err := b.start(); err != nil {
		d.wrong("%v", err)
		return nil
	}
	if err := d.up(b, d.instant(i)); err != nil {
		d.wrong("%v", err)
	}
	return b
}

// instant returns when to kill operation i: two of five, at any time that it may take.
func (d *driver) instant(i int) time.Duration {
	if i%5 > 1 {
		return 0
	}
	return 1 + time.Duration(rand.Int64N(int64(d.took)*int64(d.AtOnce)/2))
}

// judge looks at what lives.
func (d *driver) judge(boxes []*box) {
	addresses, ports := map[string]bool{}, map[int]bool{}
	for _, b := range boxes {
		if b == nil || !b.up {
			continue
		}
		if addresses[b.address] || b.address == "" {
			d.wrong("%s has the address %q, as another has", b.handle, b.address)
		}
		addresses[b.address] = true
		if want := strings.Count(b.netin, "host_port"); len(b.ports) != want {
			d.wrong("%s has ports %v, want %d", b.handle, b.ports, want)
		}
		for _, p := range b.ports {
			if ports[p] || p < 61000 || p > 65535 {
				d.wrong("%s has the port %d, as another has", b.handle, p)
			}
			ports[p] = true
		}
	}
	if i := slices.IndexFunc(boxes, func(b *box) bool { return b != nil && b.up && len(b.ports) > 0 }); i >= 0 {
		if err := d.reach(boxes[i]); err != nil {
			d.wrong("%v", err)
		}
	}
}

// reach connects to a container by a port of the host.
func (d *driver) reach(b *box) error {
	ns, err := kernel.OpenNS(fmt.Sprintf("/proc/%d/ns/net", b.init.Process.Pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	var l net.Listener
	if err := ns.Do(func() (err error) { l, err = net.Listen("tcp4", "0.0.0.0:8080"); return err }); err != nil {
		return err
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			fmt.Fprint(c, b.handle)
			c.Close()
		}
	}()
	c, err := net.DialTimeout("tcp4", fmt.Sprintf("127.0.0.1:%d", b.ports[0]), 10*time.Second)
	if err != nil {
		return fmt.Errorf("reach %s: %w", b.handle, err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 100)
	if n, err := c.Read(buf); string(buf[:n]) != b.handle {
		return fmt.Errorf("%s answers %q, %v", b.handle, buf[:n], err)
	}
	return nil
}

// die ends container i: sometimes before Garden takes it down, and sometimes the networker is killed at that, once or twice.
func (d *driver) die(i int, b *box) {
	if b == nil {
		return
	}
	gone := i%3 == 0
	if gone {
		b.stop()
	}
	for n := range 1 + i%3 {
		if err := d.down(b, d.instant(i+n)); err != nil {
			d.wrong("%v", err)
		}
	}
	if err := d.down(b, 0); err != nil {
		d.wrong("%v", err)
	}
	if !gone {
		b.stop()
	}
}

var volatile = regexp.MustCompile(`(valid_lft|preferred_lft) \S+|expires \S+|handle \d+`)

// dump returns what the host has, in words.
func (d *driver) dump() (string, error) {
	var out strings.Builder
	for _, args := range []string{"ip -d link", "ip addr", "ip route show table all", "ip rule", "nft list ruleset"} {
		f := strings.Fields(args)
		b, err := exec.Command(f[0], f[1:]...).Output()
		if err != nil {
			return "", fmt.Errorf("%s: %w", args, err)
		}
		fmt.Fprintf(&out, "# %s\n", args)
		for line := range strings.Lines(volatile.ReplaceAllString(string(b), "")) {
			if !strings.Contains(line, " fe80::") { // of the host's own device, which is still new
				out.WriteString(line)
			}
		}
	}
	for _, dir := range []string{d.Dir, "/run/silk/endpoints"} {
		err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() || strings.HasPrefix(e.Name(), ".cursor-") || e.Name() == ".ports" {
				return err
			}
			b, err := os.ReadFile(path)
			fmt.Fprintf(&out, "%s %q\n", path, b)
			return err
		})
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
	}
	return out.String(), nil
}

// TestGarden: 200 containers come and go on a host of a lab, 20 at a time, while the networker is killed at random instants. In the end the host
// is as it was.
func TestGarden(t *testing.T) {
	if os.Geteuid() != 0 {
		testkit.Require(t, "root", errors.New("not run by root"))
	}
	for _, p := range []string{"ip", "nft"} {
		_, err := exec.LookPath(p)
		testkit.Require(t, "nft", err)
	}
	base := t.TempDir()
	if err := os.Chmod(base, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := lab.Up(t.Context(), lab.Options{Dir: filepath.Join(base, "lab"), Programs: programs, Hosts: 2, Containers: -1, Policy: lab.PolicyNone})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	testkit.Until(t, time.Minute, "the lab is not whole", func() bool { s, err := l.Status(t.Context()); return err == nil && s.Whole() })
	dir := filepath.Join(base, "garden")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	count := 200
	if testing.Short() {
		count = 40
	}
	arg, err := json.Marshal(&driver{Programs: programs, Dir: dir, Count: count, AtOnce: 20})
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := l.Output(t.Context(), "host1", self, driverArg, string(arg))
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%s", out)
}

// sleeper is a container's first process.
func sleeper() *exec.Cmd { return exec.Command("sleep", "3600") }

func kernelUnbind(path string) { kernel.UnbindNS(path) }

func read(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
