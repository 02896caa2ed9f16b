package garden

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// loadList returns the CNI configuration: the first .conflist of the directory and what is below it, in lexical order, or else
// the first .conf as a list of one. nil when there is none. More than one is told.
func (n *networker) loadList() (*libcni.NetworkConfigList, error) {
	var lists, single []string
	err := filepath.WalkDir(n.cfg.CNIConfigDir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
		case strings.HasSuffix(path, ".conflist"):
			lists = append(lists, path)
		case strings.HasSuffix(path, ".conf"):
			single = append(single, path)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("load cni config: error loading config: %w", err)
	}
	all := slices.Concat(lists, single)
	if len(all) == 0 {
		return nil, nil
	}
	path := all[0]
	if len(all) > 1 {
		n.warn("%d CNI configurations in %s: %s is used, the first .conflist or else the first .conf in lexical order", len(all), n.cfg.CNIConfigDir, path)
	}
	list, err := readList(path)
	if err != nil {
		return nil, fmt.Errorf("load cni config: unable to load config from %s: %w", path, err)
	}
	return list, nil
}

func readList(path string) (*libcni.NetworkConfigList, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseList(b, strings.HasSuffix(path, ".conf"))
}

// parseList reads a list of plugins, or a single plugin's configuration as a list of one.
func parseList(b []byte, single bool) (*libcni.NetworkConfigList, error) {
	if single {
		var plugin map[string]json.RawMessage
		if err := json.Unmarshal(b, &plugin); err != nil {
			return nil, err
		}
		var err error
		if b, err = json.Marshal(map[string]any{"name": plugin["name"], "cniVersion": plugin["cniVersion"], "plugins": []any{plugin}}); err != nil {
			return nil, err
		}
	}
	list, err := libcni.NetworkConfFromBytes(b)
	if err == nil && len(list.Plugins) == 0 {
		err = errors.New("no plugins in list")
	}
	return list, err
}

// plugins runs the plugins of a list. They inherit lock.
func (n *networker) plugins(lock *os.File) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir([]string{n.cfg.CNIPluginDir}, n.cfg.CNICacheDir, &runner{lock: lock})
}

func (n *networker) runtimeConf() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: n.handle, NetNS: n.netns(), IfName: n.cfg.Interface}
}

// inject gives every plugin of the list what Garden says about the container, whatever capabilities it declares.
func inject(list *libcni.NetworkConfigList, values map[string]any) (*libcni.NetworkConfigList, error) {
	out := *list
	out.Plugins = nil
	for _, p := range list.Plugins {
		with, err := libcni.InjectConf(p, values)
		if err != nil {
			return nil, err
		}
		out.Plugins = append(out.Plugins, with)
	}
	return &out, nil
}

// cniAdd has the plugins attach the container. A failure leaves what the plugins before it made.
func (n *networker) cniAdd(ctx context.Context, lock *os.File, list *libcni.NetworkConfigList) (types.Result, error) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.timeout())
	defer cancel()
	r, err := n.plugins(lock).AddNetworkList(ctx, list, n.runtimeConf())
	if err != nil {
		return nil, fmt.Errorf("cni up failed: add network list failed: %w", err)
	}
	return r, nil
}

// cniDel has the plugins detach the container, those of list, which may be nil, and those that the cache says it was attached by under
// another name.
func (n *networker) cniDel(ctx context.Context, lock *os.File, list *libcni.NetworkConfigList) error {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.timeout())
	defer cancel()
	plugins := n.plugins(lock)
	attached, err := plugins.GetCachedAttachments(n.handle)
	if err != nil {
		n.warn("read cached CNI results: %v", err)
	}
	run := func(l *libcni.NetworkConfigList, rt *libcni.RuntimeConf) error {
		if err := plugins.DelNetworkList(ctx, l, rt); err != nil {
			return fmt.Errorf("cni down: del network failed: %w", err)
		}
		return nil
	}
	for _, a := range attached {
		if list != nil && a.Network == list.Name && a.IfName == n.cfg.Interface {
			continue
		}
		old, err := parseList(a.Config, false)
		if err != nil {
			n.warn("read cached CNI result of network %s: %v", a.Network, err)
			continue
		}
		rt := n.runtimeConf()
		rt.IfName = a.IfName
		if err := run(old, rt); err != nil {
			return err
		}
	}
	if list == nil {
		return nil
	}
	return run(list, n.runtimeConf())
}

// cached reports whether libcni knows the container.
func (n *networker) cached() bool {
	a, err := n.plugins(nil).GetCachedAttachments(n.handle)
	return err == nil && len(a) > 0
}

// runner runs a plugin as libcni does, but with an end: when the time is up, the plugin and what it has started are killed, and when this
// process is killed, the plugin is. It inherits the container's lock, so that nobody works on the container as long as it is there.
type runner struct {
	version.PluginDecoder

	lock *os.File // nil for none
}

// FindInPath finds a plugin's program.
func (runner) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

// afterKill bounds the wait for what a killed plugin's children still have to say.
const afterKill = time.Second

// ExecPlugin runs a plugin to its end and returns what it printed.
func (r runner) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = environment(environ)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	if r.lock != nil {
		cmd.ExtraFiles = []*os.File{r.lock}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = afterKill
	runtime.LockOSThread() // the signal is sent when the thread ends that started the plugin
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	if err == nil {
		os.Stderr.Write(stderr.Bytes())
		return stdout.Bytes(), nil
	}
	if ctx.Err() != nil {
		return nil, &types.Error{Msg: fmt.Sprintf("%s was killed: %v%s", filepath.Base(path), context.Cause(ctx), said(stderr.Bytes()))}
	}
	return nil, pluginError(err, stdout.Bytes(), stderr.Bytes())
}

func said(stderr []byte) string {
	if len(stderr) == 0 {
		return ""
	}
	return fmt.Sprintf(": %q", stderr)
}

// pluginError returns what a plugin says about its failure.
func pluginError(err error, stdout, stderr []byte) error {
	e := new(types.Error)
	switch {
	case len(stdout) > 0:
		if bad := json.Unmarshal(stdout, e); bad != nil {
			return &types.Error{Msg: fmt.Sprintf("netplugin failed but error parsing its diagnostic message %q: %v", stdout, bad)}
		}
	case len(stderr) > 0:
		e.Msg = fmt.Sprintf("netplugin failed: %q", stderr)
	default:
		e.Msg = fmt.Sprintf("netplugin failed with no error message: %v", err)
	}
	return e
}

// environment returns what plugins get. Who runs the program by its mode with more rights than he has himself must not say more than
// Garden does.
func environment(environ []string) []string {
	if os.Getuid() == os.Geteuid() {
		return environ
	}
	own := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	for _, v := range environ {
		if slices.ContainsFunc(pluginVariables, func(name string) bool { return strings.HasPrefix(v, name+"=") }) {
			own = append(own, v)
		}
	}
	return own
}

// pluginVariables are what the specification says about an operation.
var pluginVariables = []string{"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"}
