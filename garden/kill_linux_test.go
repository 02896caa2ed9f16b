package garden_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestKilledAtEverySystemCall kills up and down, and now and then the plugin below them, at each call by which they change something or wait. The
// file of ports can be read at every instant, and a down leaves nothing.
func TestKilledAtEverySystemCall(t *testing.T) {
	strace, err := exec.LookPath("strace")
	testkit.Require(t, "tools", err)
	c := newCell(t)
	c.adapter["proxy_redirect_cidr"] = "10.127.0.0/16"
	const in = `{"netin":[{"host_port":0,"container_port":8080}]}`
	_, first := c.container()
	c.up("first", in, first)
	c.down("first")
	before, kills := c.dump(), 0
	for _, action := range []string{"up", "down", "net-in"} {
		for _, call := range []string{"renameat", "unlinkat", "write", "flock", "mount", "umount2", "fsync", "fchmod"} {
			for n, killed := 1, true; killed && n < 30; n++ {
				handle := fmt.Sprintf("%s-%s-%d", action, call, n)
				_, f := c.container()
				stdin := in
				if action != "up" {
					c.up(handle, in, f)
				}
				if action == "net-in" {
					stdin = `{"HostPort":9000,"ContainerPort":22}`
				}
				real := c.command(stdin, "--configFile="+c.path("adapter.json"), "--action", action, "--handle", handle)
				cmd := exec.Command(strace, append([]string{"-f", "-qq", "-o", "/dev/null", "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n)}, real.Args...)...)
				cmd.Path, cmd.Stdin = strace, real.Stdin
				cmd.Args[len(cmd.Args)-len(real.Args)] = filepath.Join(programs, "garden-external-networker")
				cmd.ExtraFiles = []*os.File{f}
				cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
				if a := c.finish(cmd); a.code != 0 {
					kills++
				} else {
					killed = false
				}
				var s struct {
					Ports map[string][]int `json:"acquired_ports"`
				}
				if err := json.Unmarshal([]byte(read(t, c.path("state/ports.json"))), &s); err != nil {
					t.Errorf("%s: %v", handle, err)
				}
				if action == "up" && n%2 == 0 { // Garden may as well go on
					if got := c.up(handle, in, f).ports(t); len(got) != 1 || got[0].HostPort != 61000 {
						t.Errorf("%s: the next up got %v", handle, got)
					}
				}
				if action == "net-in" {
					if a := c.run(action, handle, stdin); a.code != 0 || len(c.record(handle).PortMaps) != 2 {
						t.Errorf("%s: the next net-in: %+v, %v", handle, a, c.record(handle).PortMaps)
					}
				}
				c.down(handle)
				if after := c.dump(); after != before {
					t.Fatalf("%s: the host is another:\n%s", handle, difference(before, after))
				}
			}
		}
	}
	if kills < 20 {
		t.Errorf("killed %d times only: the test does not tell much", kills)
	}
	t.Logf("killed %d times", kills)
}
