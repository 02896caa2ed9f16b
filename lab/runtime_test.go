package lab_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/lab"
)

// image is the name of what the runtimes run: a static busybox and nothing else.
const image = "docker.io/library/silk-test:1"

// A runtime starts containers of image on lab hosts and calls silk-cni by itself.
type runtime interface {
	name() string
	needs() []string
	// setup prepares a host; what it starts ends with the test.
	setup(t *testing.T, h *runtimeHost)
	// run starts a container that runs a shell script, and returns when the container has its address.
	run(t *testing.T, h *runtimeHost, id, script string)
	// exec runs a command in it.
	exec(id string, command ...string) []string
	// remove ends and removes it.
	remove(t *testing.T, h *runtimeHost, id string)
	// kill returns the script by which remove begins.
	kill(id string) string
}

// runtimeHost is one host of the lab.
type runtimeHost struct {
	lab  *lab.Lab
	name string
	dir  string // of the test, seen from the host as well
	cni  string // directory of the plugins
}

func (h *runtimeHost) sh(t *testing.T, script string) string {
	t.Helper()
	out, err := h.lab.Output(t.Context(), h.name, "/bin/sh", "-ec", script)
	if err != nil {
		t.Fatalf("%s: %s: %v", h.name, script, err)
	}
	return string(out)
}

// background starts a command on the host that goes on until the test ends. Its output goes to a file in the test's directory.
func (h *runtimeHost) background(t *testing.T, label string, command ...string) (done <-chan error) {
	t.Helper()
	log, err := os.Create(filepath.Join(h.dir, h.name+"-"+label+".log"))
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		code, err := h.lab.Exec(ctx, h.name, command, null, log, log)
		if err == nil && code != 0 {
			err = fmt.Errorf("exit status %d", code)
		}
		ended <- err
		close(ended)
		null.Close()
		log.Close()
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("%s on %s:\n%s", label, h.name, b[max(0, len(b)-4000):])
		}
	})
	return ended
}

// runtimesMeet is what every runtime must do: containers on two hosts reach each other by ICMP and HTTP, and removal leaves nothing.
func runtimesMeet(t *testing.T, rt runtime) {
	needRoot(t)
	for _, p := range append(rt.needs(), "ip", "nft", "/bin/busybox") {
		_, err := exec.LookPath(p)
		testkit.Require(t, rt.name(), err)
	}
	l := up(t, lab.Options{Hosts: 2, Containers: -1})
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	writeImage(t, filepath.Join(dir, "image.tar"))
	eventually(t, l, "both hosts are ready", func(s lab.Status) bool { return s.Whole() })
	var hosts []*runtimeHost
	before := map[string]string{}
	for _, name := range []string{"host1", "host2"} {
		h := &runtimeHost{lab: l, name: name, dir: dir, cni: programs}
		rt.setup(t, h)
		await(t, name+" knows the other host", func() error {
			out, err := l.Output(t.Context(), name, "ip", "route", "show", "proto", "83")
			if err == nil && len(out) == 0 {
				err = errors.New("no route to a peer")
			}
			return err
		})
		before[name] = h.dump(t)
		hosts = append(hosts, h)
	}
	serve := func(id string) string {
		return fmt.Sprintf("echo hello from %s > /www/index.html; exec httpd -f -p 8080 -h /www", id)
	}
	addr := map[string]string{}
	for _, h := range hosts {
		id := "web-" + h.name
		t.Cleanup(func() { // of a failed test: its control groups are the machine's
			if t.Failed() {
				h.lab.Output(context.Background(), h.name, "/bin/sh", "-c", rt.kill(id))
			}
		})
		rt.run(t, h, id, serve(id))
		var fields []string
		await(t, id+" has an address", func() error { // ctr may end before it has passed on what the command wrote
			fields = strings.Fields(h.sh(t, shell(rt.exec(id, "ip", "-4", "-o", "addr", "show", "eth0"))))
			if len(fields) < 4 {
				return fmt.Errorf("got %q", fields)
			}
			return nil
		})
		addr[id], _, _ = strings.Cut(fields[3], "/")
	}
	for i, h := range hosts {
		own, other := "web-"+h.name, "web-"+hosts[1-i].name
		if out := h.sh(t, shell(rt.exec(own, "ping", "-c", "2", "-W", "5", addr[other]))); !strings.Contains(out, " 0% packet loss") {
			t.Errorf("%s pings %s (%s):\n%s", own, other, addr[other], out)
		}
		await(t, own+" fetches from "+other, func() error { // ctr may end before it has passed on what the command wrote
			out, err := h.lab.Output(t.Context(), h.name, rt.exec(own, "wget", "-qO-", "http://"+addr[other]+":8080/")...)
			if want := "hello from " + other + "\n"; err == nil && string(out) != want {
				err = fmt.Errorf("got %q, want %q", out, want)
			}
			return err
		})
	}
	for _, h := range hosts {
		rt.remove(t, h, "web-"+h.name)
		await(t, h.name+" is as before its container", func() error {
			if after := h.dump(t); after != before[h.name] {
				return fmt.Errorf("before:\n%s\nafter:\n%s", before[h.name], after)
			}
			return nil
		})
	}
}

// dump lists what an attachment leaves on a host.
func (h *runtimeHost) dump(t *testing.T) string {
	t.Helper()
	return h.sh(t, `ip -o link | sed 's/^[0-9]*: //' | cut -d' ' -f1 | sort; ip route; ip neigh show nud permanent | sort; ls /run/silk/endpoints 2>/dev/null | grep -v -e lock -e cursor || true; nft list ruleset | grep -v counter | sort`)
}

// shell quotes a command for /bin/sh.
func shell(command []string) string {
	q := make([]string, len(command))
	for i, w := range command {
		q[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(q, " ")
}

// private gives the host directories of its own, which the machine must have, where runtimes keep state and look for plugins, and
// a network configuration.
func (h *runtimeHost) private(t *testing.T, version string, dirs ...string) {
	t.Helper()
	for _, d := range dirs {
		h.sh(t, "mount -t tmpfs none "+d)
	}
	h.sh(t, `mkdir -p /etc/cni/net.d && cat > /etc/cni/net.d/10-silk.conflist <<'X'
{"cniVersion": "`+version+`", "name": "silk", "plugins": [{"type": "silk-cni", "daemonPort": 23954}]}
X`)
}

type containerd struct{}

func (containerd) name() string    { return "containerd" }
func (containerd) needs() []string { return []string{"containerd", "ctr", "runc"} }

func (containerd) setup(t *testing.T, h *runtimeHost) {
	h.private(t, "1.0.0", "/opt")
	h.sh(t, "mkdir -p /opt/cni/bin && cp "+h.cni+"/silk-cni /opt/cni/bin/")
	config := filepath.Join(h.dir, h.name+"-containerd.toml")
	content := fmt.Sprintf("version = 2\nroot = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n", filepath.Join(h.dir, h.name+"-containerd"))
	if err := os.WriteFile(config, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	h.background(t, "containerd", "containerd", "-c", config)
	await(t, "containerd answers", func() error {
		_, err := h.lab.Output(t.Context(), h.name, "ctr", "version")
		return err
	})
	h.sh(t, "ctr image import --snapshotter native "+filepath.Join(h.dir, "image.tar"))
}

func (c containerd) run(t *testing.T, h *runtimeHost, id, script string) {
	// Detached, ctr would leave the network behind on removal: it stays in front, in the background of the test.
	h.background(t, "ctr-"+id, "ctr", "run", "--cni", "--rm", "--snapshotter", "native", image, id, "/bin/sh", "-c", script)
	await(t, "container "+id+" has an address", func() error {
		out, err := h.lab.Output(t.Context(), h.name, c.exec(id, "ip", "-4", "-o", "addr", "show", "eth0")...)
		if err == nil && !bytes.Contains(out, []byte("inet ")) {
			err = fmt.Errorf("no address: %s", out)
		}
		return err
	})
}

func (containerd) exec(id string, command ...string) []string {
	return append([]string{"ctr", "task", "exec", "--exec-id", fmt.Sprint("x", time.Now().UnixNano()), id}, command...)
}

func (containerd) kill(id string) string { return "ctr task kill -s KILL " + id }

func (c containerd) remove(t *testing.T, h *runtimeHost, id string) {
	h.sh(t, c.kill(id))
	await(t, "container "+id+" is gone", func() error {
		out, err := h.lab.Output(t.Context(), h.name, "ctr", "container", "ls", "-q")
		if err == nil && strings.Contains(string(out), id) {
			err = fmt.Errorf("still there: %s", out)
		}
		return err
	})
}

type podman struct{}

func (podman) name() string    { return "podman" }
func (podman) needs() []string { return []string{"podman", "runc", "conmon"} }

func (podman) setup(t *testing.T, h *runtimeHost) {
	h.private(t, "0.4.0", "/etc/containers", "/var/lib/containers", "/dev/shm")
	h.sh(t, `mkdir -p /run/cni-bin && cp `+h.cni+`/silk-cni /run/cni-bin/
cat > /etc/containers/containers.conf <<'X'
[network]
network_backend = "cni"
cni_plugin_dirs = ["/run/cni-bin"]
network_config_dir = "/etc/cni/net.d"
default_network = "silk"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[containers]
log_driver = "k8s-file"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
X
echo '{"default": [{"type": "insecureAcceptAnything"}]}' > /etc/containers/policy.json
podman load -q -i `+filepath.Join(h.dir, "image.tar"))
}

func (podman) run(t *testing.T, h *runtimeHost, id, script string) {
	h.sh(t, shell([]string{"podman", "run", "-d", "--name", id, "--network", "silk", "--cap-add", "NET_RAW", image, "/bin/sh", "-c", script}))
}

func (podman) exec(id string, command ...string) []string {
	return append([]string{"podman", "exec", id}, command...)
}

func (podman) kill(id string) string { return "podman rm -f -t 0 " + id }

func (p podman) remove(t *testing.T, h *runtimeHost, id string) { h.sh(t, p.kill(id)) }

func TestContainerd(t *testing.T) { runtimesMeet(t, containerd{}) }

func TestPodman(t *testing.T) {
	out, err := exec.Command("podman", "--version").Output()
	if err == nil && regexp.MustCompile(`version ([5-9]|\d\d)`).Match(out) { // as Debian 13 has it
		err = fmt.Errorf("%s, which has no CNI: 4 is the last that has", bytes.TrimSpace(out))
	}
	testkit.Require(t, "podman", err)
	runtimesMeet(t, podman{})
}

// writeImage writes an image in docker-archive form, which both runtimes load: one layer with a static busybox.
func writeImage(t *testing.T, path string) {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	add := func(h *tar.Header, content []byte) {
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		w.Write(content)
	}
	for _, d := range []string{"bin", "etc", "tmp", "proc", "sys", "dev", "run", "www"} {
		add(&tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	add(&tar.Header{Name: "bin/busybox", Typeflag: tar.TypeReg, Mode: 0o755}, busybox)
	for _, n := range []string{"sh", "ip", "ping", "wget", "httpd"} {
		add(&tar.Header{Name: "bin/" + n, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
	}
	w.Close()
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Env": []string{"PATH=/bin"}, "Cmd": []string{"/bin/sh"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + sum(layer.Bytes())}},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal([]map[string]any{{"Config": sum(config) + ".json", "RepoTags": []string{image}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w = tar.NewWriter(f)
	add(&tar.Header{Name: sum(config) + ".json", Mode: 0o644}, config)
	add(&tar.Header{Name: "layer.tar", Mode: 0o644}, layer.Bytes())
	add(&tar.Header{Name: "manifest.json", Mode: 0o644}, manifest)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}
