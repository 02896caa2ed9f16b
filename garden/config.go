package garden

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// config is the configuration file. Keys match in any case.
type config struct {
	CNIPluginDir     string   `json:"cni_plugin_dir"`
	CNIConfigDir     string   `json:"cni_config_dir"`
	BindMountDir     string   `json:"bind_mount_dir"`
	StateFile        string   `json:"state_file"`
	StartPort        int      `json:"start_port"`
	TotalPorts       int      `json:"total_ports"`
	LogPrefix        string   `json:"log_prefix"`
	SearchDomains    []string `json:"search_domains"`
	IPTablesLockFile string   `json:"iptables_lock_file"` // required, and means nothing here
	RedirectCIDR     string   `json:"proxy_redirect_cidr"`
	ProxyPort        int      `json:"proxy_port"`
	ProxyUID         *int     `json:"proxy_uid"`
	RedirectIngress  bool     `json:"enable_ingress_proxy_redirect"`

	// What earlier releases do not have.
	CNICacheDir      string `json:"cni_cache_dir"`       // of libcni; default /var/lib/cni
	CNITimeoutSecond int    `json:"cni_timeout_seconds"` // of all plugins of an operation; default 300
	Interface        string `json:"interface"`           // the container's; default eth0

	redirectCIDR netip.Prefix
}

// defaultTimeout is generous: a plugin may wait a minute for another operation, and a list has several.
const defaultTimeout = 300 * time.Second

func (c *config) timeout() time.Duration {
	if c.CNITimeoutSecond == 0 {
		return defaultTimeout
	}
	return time.Duration(c.CNITimeoutSecond) * time.Second
}

// args is the command line.
type args struct {
	config         config
	action, handle string
	warnings       []string
}

// parseArgs reads the command line and the configuration that it names, in the order in which Garden's operators know the errors.
func parseArgs(list []string) (args, error) {
	if len(list) == 0 || list[0] == "-h" || list[0] == "--help" {
		return args{}, errHelp
	}
	var a args
	var path string
	f := flag.NewFlagSet("", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&path, "configFile", "", "")
	f.StringVar(&a.action, "action", "", "")
	f.StringVar(&a.handle, "handle", "", "")
	err := f.Parse(list)
	if err == nil && path == "" {
		err = errors.New("missing required flag 'configFile'")
	}
	if err == nil {
		a.config, a.warnings, err = loadConfig(path)
	}
	switch {
	case err != nil:
	case f.NArg() > 0:
		err = fmt.Errorf("unexpected extra args: %v", f.Args())
	case a.handle == "":
		err = errors.New("missing required flag 'handle'")
	case a.action == "":
		err = errors.New("missing required flag 'action'")
	}
	if err != nil {
		return args{}, fmt.Errorf("parse args: %w", err)
	}
	return a, nil
}

// maxConfig bounds the configuration file in bytes.
const maxConfig = 1 << 20

// loadConfig reads the configuration file.
func loadConfig(path string) (config, []string, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return config{}, nil, fmt.Errorf("file does not exist: %s", path)
	}
	if err != nil {
		return config{}, nil, fmt.Errorf("reading config file: %w", err)
	}
	defer f.Close()
	if err := trusted(f); err != nil {
		return config{}, nil, fmt.Errorf("reading config file: %w", err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(b) > maxConfig {
		err = fmt.Errorf("%s is longer than %d bytes", path, maxConfig)
	}
	if err != nil {
		return config{}, nil, fmt.Errorf("reading config file: %w", err)
	}
	c, warnings, err := parseConfig(b)
	if _, invalid := errors.AsType[invalidConfig](err); err != nil && !invalid {
		err = fmt.Errorf("parsing config (%s): %w", path, err)
	}
	return c, warnings, err
}

// trusted refuses a file that others than the superuser can write, if the program has been given the superuser's rights by its mode: who runs it
// could otherwise have any program run with these.
func trusted(f *os.File) error {
	if os.Getuid() == os.Geteuid() {
		return nil
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; owner != 0 || st.Mode()&^(fs.ModePerm&^0o022) != 0 {
		return fmt.Errorf("%s has owner %d and mode %v: expected a file of the superuser that nobody else can write", f.Name(), owner, st.Mode())
	}
	return nil
}

// invalidConfig is what is wrong with the values of a configuration that can be read.
type invalidConfig struct{ error }

// Unwrap returns the cause.
func (e invalidConfig) Unwrap() error { return e.error }

// parseConfig reads and judges a configuration. A key that is none of ours is passed over with a warning.
func parseConfig(b []byte) (config, []string, error) {
	var c config
	if err := json.Unmarshal(b, &c); err != nil {
		return config{}, nil, err
	}
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(b, &keys); err != nil {
		return config{}, nil, err
	}
	var warnings []string
	for k := range keys {
		if !slices.ContainsFunc(configKeys, func(n string) bool { return strings.EqualFold(n, k) }) {
			warnings = append(warnings, fmt.Sprintf("configuration key %q means nothing here and is ignored", k))
		}
	}
	slices.Sort(warnings)
	if err := c.validate(); err != nil {
		return config{}, nil, invalidConfig{err}
	}
	return c, warnings, nil
}

var configKeys = []string{
	"cni_plugin_dir", "cni_config_dir", "bind_mount_dir", "state_file", "start_port", "total_ports", "log_prefix", "search_domains", "iptables_lock_file",
	"proxy_redirect_cidr", "proxy_port", "proxy_uid", "enable_ingress_proxy_redirect", "cni_cache_dir", "cni_timeout_seconds", "interface",
}

// validate judges the values and fills in what is not there.
func (c *config) validate() error {
	for _, r := range []struct {
		key     string
		present bool
	}{
		{"cni_plugin_dir", c.CNIPluginDir != ""}, {"cni_config_dir", c.CNIConfigDir != ""}, {"bind_mount_dir", c.BindMountDir != ""},
		{"state_file", c.StateFile != ""}, {"start_port", c.StartPort != 0}, {"total_ports", c.TotalPorts != 0}, {"log_prefix", c.LogPrefix != ""},
		{"iptables_lock_file", c.IPTablesLockFile != ""}, {"proxy_port", c.ProxyPort != 0}, {"proxy_uid", c.ProxyUID != nil},
	} {
		if !r.present {
			return fmt.Errorf("missing required config '%s'", r.key)
		}
	}
	if c.StartPort < 1 || c.TotalPorts < 1 || c.StartPort > maxPort {
		return fmt.Errorf("invalid config 'start_port' %d, 'total_ports' %d: expected ports from 1 to %d", c.StartPort, c.TotalPorts, maxPort)
	}
	c.TotalPorts = min(c.TotalPorts, maxPort+1-c.StartPort) // the range that is deployed goes beyond the last port
	if c.ProxyPort < 1 || c.ProxyPort > maxPort {
		return fmt.Errorf("invalid config 'proxy_port' %d: expected 1 to %d", c.ProxyPort, maxPort)
	}
	if *c.ProxyUID < 0 || int64(*c.ProxyUID) > 1<<32-2 {
		return fmt.Errorf("invalid config 'proxy_uid' %d: expected a user's number", *c.ProxyUID)
	}
	if c.CNITimeoutSecond < 0 || c.CNITimeoutSecond > 24*3600 {
		return fmt.Errorf("invalid config 'cni_timeout_seconds' %d: expected 1 to %d, or 0 for %v", c.CNITimeoutSecond, 24*3600, defaultTimeout)
	}
	if c.RedirectCIDR != "" {
		p, err := netip.ParsePrefix(c.RedirectCIDR)
		if err != nil || !p.Addr().Is4() {
			return fmt.Errorf("invalid config 'proxy_redirect_cidr' %q: expected an IPv4 network such as 10.127.0.0/16", c.RedirectCIDR)
		}
		c.redirectCIDR = p.Masked()
	}
	if c.CNICacheDir == "" {
		c.CNICacheDir = "/var/lib/cni"
	}
	if c.Interface == "" {
		c.Interface = "eth0"
	}
	return nil
}

const maxPort = 65535
