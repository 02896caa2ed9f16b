package garden_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestSetuid: who has the superuser's rights by the program's mode only can have it work on containers, with a configuration of the superuser and without
// saying anything to the plugins.
func TestSetuid(t *testing.T) {
	c := newCell(t)
	for _, d := range []string{filepath.Dir(c.dir), c.dir} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var st syscall.Statfs_t
	const nosuid = 2 // ST_NOSUID
	err := syscall.Statfs(c.dir, &st)
	if err == nil && st.Flags&nosuid != 0 {
		err = syscall.EPERM
	}
	testkit.Require(t, "root", err)
	program := c.path("networker")
	b, err := os.ReadFile(filepath.Join(programs, "garden-external-networker"))
	if err == nil {
		err = os.WriteFile(program, b, 0o755)
	}
	if err == nil {
		err = os.Chmod(program, 0o755|os.ModeSetuid)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.write("env", "") // a shell lets go of rights that it has by a mode
	if err := os.Chmod(c.path("env"), 0o666); err != nil {
		t.Fatal(err)
	}
	c.alone(`env >` + c.dir + `/env; ` + attached)
	b, err = json.Marshal(c.adapter)
	if err != nil {
		t.Fatal(err)
	}
	c.write("adapter.json", string(b))
	_, f := c.container()
	run := func(action string) answer {
		cmd := exec.Command(program, "--configFile="+c.path("adapter.json"), "--action", action, "--handle", "h")
		cmd.Stdin = strings.NewReader("{}")
		cmd.Env = []string{"LD_PRELOAD=/tmp/x.so", "PATH=/tmp", "BASH_ENV=/tmp/x", "CNI_ARGS=IP=1.2.3.4"}
		cmd.ExtraFiles = []*os.File{f}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		return c.finish(cmd)
	}
	if a := run("up"); a.code != 0 {
		t.Errorf("up: %+v", a)
	}
	for _, v := range []string{"LD_PRELOAD", "BASH_ENV", "\nPATH=/tmp", "1.2.3.4"} {
		if env := read(t, c.path("env")); strings.Contains(env, v) || !strings.Contains(env, "CNI_COMMAND=ADD") {
			t.Errorf("the plugin has the environment %s", env)
		}
	}
	if a := run("down"); a.code != 0 {
		t.Errorf("down: %+v", a)
	}
	for name, spoil := range map[string]func() error{
		"owner": func() error { return os.Chown(c.path("adapter.json"), 65534, 0) },
		"mode":  func() error { return os.Chmod(c.path("adapter.json"), 0o664) },
	} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if a := run("up"); a.code != 1 || !strings.Contains(a.stderr, "expected a file of the superuser that nobody else can write") {
			t.Errorf("%s: %+v", name, a)
		}
		os.Chown(c.path("adapter.json"), 0, 0)
		os.Chmod(c.path("adapter.json"), 0o644)
	}
	cmd := exec.Command(program, "--configFile="+c.dir, "--action", "up", "--handle", "h")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if a := c.finish(cmd); a.code != 1 || !strings.Contains(a.stderr, "expected a file of the superuser that nobody else can write") {
		t.Errorf("what is no file: %+v", a)
	}
}

// TestOptions: what the configuration says beyond the deployed one's.
func TestOptions(t *testing.T) {
	c := newCell(t)
	c.adapter["interface"] = "net0"
	c.adapter["enable_ingress_proxy_redirect"], c.adapter["proxy_redirect_cidr"] = true, "10.127.0.0/16"
	c.adapter["cni_timout_seconds"] = 7
	ns, f := c.container()
	a := c.run("up", "h", "{}", f)
	if a.code != 0 || !strings.Contains(a.stdout, `"garden.network.interface":"net0"`) || a.stderr != `cell: configuration key "cni_timout_seconds" means nothing here and is ignored`+"\n" {
		t.Errorf("up: %+v", a)
	}
	var rules []byte
	if err := ns.Do(func() (err error) { rules, err = exec.Command("nft", "list", "ruleset").Output(); return err }); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(rules), "redirect to :15001"); n != 2 {
		t.Errorf("rules in the container:\n%s", rules)
	}
	c.down("h")
	if got := dumpFiles(t, c.path("endpoints"), c.path("cache"), c.path("netns")); strings.Contains(got, "net0") || strings.Contains(got, "netns/h") {
		t.Errorf("left: %s", got)
	}
}
