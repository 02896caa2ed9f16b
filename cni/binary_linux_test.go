package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// binary is the directory that the built plugins are in.
var binary = sync.OnceValues(func() (string, error) {
	dir, remove, err := testkit.Programs("silk-cni", "cni-wrapper-plugin")
	if err == nil {
		atEnd = remove
	}
	return dir, err
})

var atEnd = func() {}

func TestMain(m *testing.M) {
	code := m.Run()
	atEnd()
	os.Exit(code)
}

// process starts the real plugin in the host's namespace.
func (h *host) process(command, config string, env map[string]string) (*exec.Cmd, *bytes.Buffer) {
	h.t.Helper()
	dir, err := binary()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(dir, "silk-cni"))
	cmd.Stdin = strings.NewReader(config)
	out := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = []string{"CNI_COMMAND=" + command}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	if err := h.ns.Do(cmd.Start); err != nil {
		h.t.Fatal(err)
	}
	return cmd, out
}

func TestManyProcessesAtOnce(t *testing.T) {
	h := newHost(t)
	store := filepath.Join(h.dir, "store.json")
	const n = 64
	var containers []container
	for i := range n {
		containers = append(containers, h.container(fmt.Sprintf("c%d", i)))
	}
	all := func(command string) []string {
		outs := make([]string, n)
		var wg sync.WaitGroup
		for i, c := range containers {
			wg.Go(func() {
				cmd, out := h.process(command, h.config("datastore", store), c.env())
				if err := cmd.Wait(); err != nil {
					t.Errorf("%s %s: %v: %s", command, c.id, err, out)
				}
				outs[i] = out.String()
			})
		}
		wg.Wait()
		return outs
	}
	seen := map[string]bool{}
	for _, out := range all("ADD") {
		var r types100.Result
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatal(err, out)
		}
		seen[r.IPs[0].Address.String()] = true
	}
	if len(seen) != n {
		t.Errorf("%d different addresses, want %d", len(seen), n)
	}
	if got := strings.Count(read(t, store), `"ip"`); got != n {
		t.Errorf("%d entries in the store, want %d", got, n)
	}
	all("CHECK")
	all("DEL")
	h.clean()
	if got := read(t, store); got != "{}\n" {
		t.Errorf("store %s", got)
	}
}

// rounds returns how often a test kills: SILK_KILL_ROUNDS, or a number that takes seconds.
func rounds(t *testing.T) int {
	s := os.Getenv("SILK_KILL_ROUNDS")
	if s == "" {
		return 250 // with the rounds of controller, daemon and overlay: 500
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// edge is what a configuration may ask for beside an address.
var edge = []any{"runtimeConfig", map[string]any{
	"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "TCP"}, map[string]any{"Host_Port": 5300, "container_port": 53, "protocol": "udp", "hostIP": "10.0.16.15"}},
	"bandwidth":    map[string]int{"ingressRate": 8000000, "ingressBurst": 160000, "egressRate": 8000000, "egressBurst": 160000},
	"netOutRules":  []any{},
}}

// TestKilledAtRandomInstants kills ADD and DEL, then lets DEL or GC clean up, then compares everything with the start.
func TestKilledAtRandomInstants(t *testing.T) {
	t.Run("plain", func(t *testing.T) { killAtRandom(t) })
	t.Run("edge", func(t *testing.T) { killAtRandom(t, edge...) })
}

func killAtRandom(t *testing.T, more ...any) {
	h := newHost(t)
	store := filepath.Join(h.dir, "store.json")
	more = append([]any{"datastore", store}, more...)
	cfg := h.config(more...)
	c := h.container("c1")
	h.add(c, more...) // what stays after a DEL (translation, sysctls) is there from here on
	h.del(c, more...)
	hostBefore, insideBefore, filesBefore := h.dump(), inside(c), h.files()
	takes := map[string]time.Duration{} // at least
	for range 5 {
		for _, command := range []string{"ADD", "DEL"} {
			start := time.Now()
			cmd, out := h.process(command, cfg, c.env())
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%s: %v: %s", command, err, out)
			}
			if took := time.Since(start); takes[command] == 0 || took < takes[command] {
				takes[command] = took
			}
		}
	}
	killed := 0
	for i := range rounds(t) {
		command := "ADD"
		if i%3 == 2 {
			command = "DEL"
			if a := h.run("ADD", cfg, c.env()); a.code != 0 {
				t.Fatalf("round %d: ADD before the DEL: %+v", i, a)
			}
		}
		cmd, _ := h.process(command, cfg, c.env())
		timer := time.NewTimer(time.Duration(rand.Int64N(int64(takes[command]) * 5 / 4)))
		<-timer.C
		if cmd.Process.Kill() == nil {
			if err := cmd.Wait(); err != nil {
				killed++
			}
		}
		if i%5 == 4 { // the runtime goes on as if nothing had happened
			if a := h.run("ADD", cfg, c.env()); a.code != 0 {
				t.Fatalf("round %d: ADD after the kill: %+v", i, a)
			}
			if a := h.run("CHECK", cfg, c.env()); a.code != 0 {
				t.Fatalf("round %d: CHECK: %+v", i, a)
			}
		}
		if i%2 == 0 {
			if a := h.run("DEL", cfg, c.env()); a.code != 0 {
				t.Fatalf("round %d: DEL: %+v", i, a)
			}
		} else if a := h.run("GC", h.config("datastore", store, "cni.dev/valid-attachments", []any{}), nil); a.code != 0 {
			t.Fatalf("round %d: GC: %+v", i, a)
		}
		if got := h.dump(); got != hostBefore {
			t.Fatalf("round %d, %s: the host was\n%s\nand is\n%s", i, command, hostBefore, got)
		}
		if got := inside(c); got != insideBefore {
			t.Fatalf("round %d, %s: the container was\n%s\nand is\n%s", i, command, insideBefore, got)
		}
		if got := h.files(); got != filesBefore {
			t.Fatalf("round %d, %s: files were\n%s\nand are\n%s", i, command, filesBefore, got)
		}
	}
	if killed < rounds(t)/4 {
		t.Errorf("killed %d of %d only: the test does not tell much", killed, rounds(t))
	}
}

// inside returns what the container's namespace has.
func inside(c container) string {
	h := host{t: fatal{}, ns: c.ns}
	return h.dump()
}

// fatal stands for a test where there is none to fail.
type fatal struct{ testing.TB }

func (fatal) Helper()                   {}
func (fatal) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }

// files returns the files that a host keeps, with what is in them, except the cursor of addresses.
func (h *host) files() string {
	h.t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(h.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), "netns-") || strings.HasPrefix(d.Name(), ".cursor-") || d.Name() == ".ports" {
			return err
		}
		b, err := os.ReadFile(path)
		fmt.Fprintf(&out, "%s %q\n", path, b)
		return err
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return out.String()
}

// TestLibcni runs the whole life of a container through the specification's own library.
func TestLibcni(t *testing.T) {
	h := newHost(t)
	dir, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	cni := libcni.NewCNIConfigWithCacheDir([]string{dir}, filepath.Join(h.dir, "cache"), nil)
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		list, err := libcni.ConfListFromBytes(fmt.Appendf(nil, `{"cniVersion":%q,"name":"silk","plugins":[%s]}`, version, h.config("cniVersion", version, "capabilities", map[string]bool{"ips": true})))
		if err != nil {
			t.Fatal(err)
		}
		c := h.container("lib-" + version)
		rt := &libcni.RuntimeConf{ContainerID: c.id, NetNS: c.path, IfName: "eth0", CapabilityArgs: map[string]any{"ips": []string{"10.255.30.50/24"}}}
		err = h.ns.Do(func() error {
			if _, err := cni.ValidateNetworkList(ctx, list); err != nil {
				return err
			}
			if err := cni.GetStatusNetworkList(ctx, list); err != nil {
				return err
			}
			result, err := cni.AddNetworkList(ctx, list, rt)
			if err != nil {
				return err
			}
			r, err := types100.GetResult(result)
			if err != nil {
				return err
			}
			if got := r.IPs[0].Address.String(); got != "10.255.30.50/32" {
				t.Errorf("%s: address %s", version, got)
			}
			if version != "0.3.1" {
				if err := cni.CheckNetworkList(ctx, list, rt); err != nil {
					return err
				}
			}
			if version == "1.1.0" { // GC sends the DEL of what is not valid any more, and then the GC
				return cni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}})
			}
			return cni.DelNetworkList(ctx, list, rt)
		})
		if err != nil {
			t.Errorf("%s: %v", version, err)
		}
		h.clean()
	}
}
