package daemon

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/lease"
)

// Config is the configuration of silk-daemon and of silk-teardown. Durations are in seconds.
type Config struct {
	UnderlayIP            string `json:"underlay_ip"`                 // IPv4 address of this host
	VXLANInterface        string `json:"vxlan_interface_name"`        // lower device; "" means the one that has UnderlayIP
	SubnetPrefixLength    int    `json:"subnet_prefix_length"`        // of a block lease
	OverlayNetwork        string `json:"overlay_network"`             // in CIDR notation
	NoMasquerade          string `json:"no_masquerade_cidr_range"`    // traffic to it keeps its source; default OverlayNetwork
	HealthCheckPort       int    `json:"health_check_port"`           // info endpoint on 127.0.0.1
	DebugServerPort       int    `json:"debug_server_port"`           // on 127.0.0.1
	VTEPName              string `json:"vtep_name"`                   // of the VXLAN device
	VNI                   int    `json:"vni"`                         // 1 to 16777215
	VTEPPort              int    `json:"vtep_port"`                   // UDP
	ConnectivityServerURL string `json:"connectivity_server_url"`     // the controller's, https
	CACertFile            string `json:"ca_cert_file"`                // PEM, as the next two
	ClientCertFile        string `json:"client_cert_file"`            //
	ClientKeyFile         string `json:"client_key_file"`             //
	PollInterval          int    `json:"poll_interval"`               // between renewals
	PartitionTolerance    int    `json:"partition_tolerance_seconds"` // how long a lease is used without a successful renewal
	ClientTimeout         int    `json:"client_timeout_seconds"`      // of one call to the controller
	Datastore             string `json:"datastore"`                   // the deployed silk-cni's store; "" means none
	LogLevel              string `json:"log_level"`                   // debug, info, warn, error
	SingleIPOnly          bool   `json:"single_ip_only"`              // ask for one address instead of a block
	StateDir              string `json:"state_dir"`                   // outlives a reboot
	EndpointDir           string `json:"endpoint_dir"`                // records of attached containers
	ResolvConf            string `json:"resolv_conf"`                 // where the host\'s resolvers are listed
}

// DefaultConfig returns the values that hold for keys a file leaves out.
func DefaultConfig() Config {
	return Config{
		SubnetPrefixLength: 24, OverlayNetwork: "10.255.0.0/16", HealthCheckPort: 23954, DebugServerPort: 22233,
		VTEPName: "silk-vtep", VNI: 1, VTEPPort: 4789, PollInterval: 30, PartitionTolerance: 168 * 3600, ClientTimeout: 5,
		LogLevel: "info", StateDir: "/var/lib/silk", EndpointDir: "/run/silk/endpoints", ResolvConf: "/etc/resolv.conf",
	}
}

// ignored are keys that existing deployments render and that mean nothing here.
var ignored = []string{"metron_port", "log_prefix"}

// Load reads the file at path over the defaults. Warnings are for the log. What is wrong with the content is
// fault.Invalid.
func Load(path string) (c Config, warnings []string, err error) {
	c = DefaultConfig()
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, nil, fmt.Errorf("load config file: reading file %s: %w", path, err)
	}
	warnings, err = config.Parse(b, &c, ignored...)
	switch {
	case err != nil && !json.Valid(b):
		return Config{}, nil, fmt.Errorf("load config file: unmarshaling contents: %w", err)
	case err != nil:
		return Config{}, nil, fmt.Errorf("load config file: invalid config: %w", err)
	}
	return c, warnings, nil
}

// maxSeconds bounds every duration: ten years.
const maxSeconds = 10 * 365 * 24 * 3600

// Validate implements config.Validator.
func (c *Config) Validate(p *config.Problems) {
	underlay, err := netip.ParseAddr(c.UnderlayIP)
	p.Require("underlay_ip", err == nil && underlay.Is4() && !underlay.IsUnspecified(), "an IPv4 address of this host, such as 10.0.16.5")
	overlay, err := netip.ParsePrefix(c.OverlayNetwork)
	p.Require("overlay_network", err == nil && overlay.Addr().Is4(), "an IPv4 network such as 10.255.0.0/16")
	if err == nil && overlay.Addr().Is4() {
		_, err := lease.NewPool(overlay.Masked(), c.SubnetPrefixLength)
		p.Check("subnet_prefix_length", err)
	}
	if c.NoMasquerade != "" {
		_, err := netip.ParsePrefix(c.NoMasquerade)
		p.Check("no_masquerade_cidr_range", err)
	}
	p.Require("vtep_name", c.VTEPName != "" && len(c.VTEPName) < 16 && !strings.ContainsAny(c.VTEPName, "/ \t\n:%"),
		"a device name of at most 15 characters")
	u, err := url.Parse(c.ConnectivityServerURL)
	p.Require("connectivity_server_url", err == nil && u.Scheme == "https" && u.Host != "", "a URL such as https://silk-controller.service.cf.internal:4103")
	p.Require("ca_cert_file", c.CACertFile != "", "a path")
	p.Require("client_cert_file", c.ClientCertFile != "", "a path")
	p.Require("client_key_file", c.ClientKeyFile != "", "a path")
	p.Require("state_dir", c.StateDir != "", "a path")
	p.Require("endpoint_dir", c.EndpointDir != "", "a path")
	for _, n := range []struct {
		path       string
		value, max int
	}{
		{"health_check_port", c.HealthCheckPort, 65535}, {"debug_server_port", c.DebugServerPort, 65535}, {"vtep_port", c.VTEPPort, 65535},
		{"vni", c.VNI, 1<<24 - 1}, {"poll_interval", c.PollInterval, 86400}, {"client_timeout_seconds", c.ClientTimeout, 3600},
		{"partition_tolerance_seconds", c.PartitionTolerance, maxSeconds},
	} {
		if n.value < 1 || n.value > n.max {
			p.Addf(n.path, "%d: expected 1 to %d", n.value, n.max)
		}
	}
	if _, ok := service.ParseLevel(c.LogLevel); !ok && c.LogLevel != "" {
		p.Addf("log_level", "%q: expected debug, info, warn or error", c.LogLevel)
	}
}

// Underlay returns the host's address outside the overlay.
func (c Config) Underlay() netip.Addr { a, _ := netip.ParseAddr(c.UnderlayIP); return a }

// Overlay returns the overlay network, masked.
func (c Config) Overlay() netip.Prefix {
	p, _ := netip.ParsePrefix(c.OverlayNetwork)
	return p.Masked()
}

// noMasquerade returns the range that traffic of containers reaches with its own source address.
func (c Config) noMasquerade() netip.Prefix {
	if c.NoMasquerade == "" {
		return c.Overlay()
	}
	p, _ := netip.ParsePrefix(c.NoMasquerade)
	return p.Masked()
}

// kind returns what the host asks the controller for.
func (c Config) kind() lease.Kind {
	if c.SingleIPOnly {
		return lease.Single
	}
	return lease.Block
}

func (c Config) interval() time.Duration  { return time.Duration(c.PollInterval) * time.Second }
func (c Config) tolerance() time.Duration { return time.Duration(c.PartitionTolerance) * time.Second }
func (c Config) timeout() time.Duration   { return time.Duration(c.ClientTimeout) * time.Second }

// certificates names the files of the client's side of mutual TLS.
func (c Config) certificates() service.Certificates {
	return service.Certificates{CA: c.CACertFile, Cert: c.ClientCertFile, Key: c.ClientKeyFile}
}
