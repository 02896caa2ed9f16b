package tlsproxy

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/internal/service"
)

// Where certificates come from.
const (
	FromAuthority = "authority" // the controller's, by way of an intermediate on this host
	FromDirectory = "directory" // files of the platform
)

// Config is the configuration of silk-tls.
type Config struct {
	EndpointDir  string `json:"endpoint_dir"` // records of attached containers
	Certificates string `json:"certificates"` // authority or directory; no default

	CertificateDirectory string `json:"certificate_directory"` // template with {container} and {group}
	CertificateFile      string `json:"certificate_file"`      // in that directory: the certificate, then those that lead to its authority
	KeyFile              string `json:"key_file"`              // likewise
	ClientCAFile         string `json:"client_ca_file"`        // authorities of clients, with directory
	TrustDomain          string `json:"trust_domain"`          // of SPIFFE ids in certificates of clients, with directory; "": Diego's organizational units alone

	ServerURL      string `json:"connectivity_server_url"` // of silk-controller, with authority
	CACertFile     string `json:"ca_cert_file"`            // PEM, as the next two
	ClientCertFile string `json:"client_cert_file"`        //
	ClientKeyFile  string `json:"client_key_file"`         //
	UnderlayIP     string `json:"underlay_ip"`             // of this host
	NamesURL       string `json:"names_url"`               // of the debug server of silk-dns on this host; "": the names of the endpoints' records alone
	StateDir       string `json:"state_dir"`               // the intermediate and its key; roots.pem

	PolicyAgent string `json:"policy_agent"` // address of its debug server, which knows the groups of clients; "": groups are not looked at

	ConnectTimeout       int `json:"connect_timeout_milliseconds"` // to a container's own port
	HandshakeTimeout     int `json:"handshake_timeout_seconds"`
	Handshakes           int `json:"max_handshakes_per_container"`            // that compute at a time
	Unfinished           int `json:"max_unfinished_handshakes_per_container"` //
	ContainerConnections int `json:"max_connections_per_container"`
	Connections          int `json:"max_connections"`
	KeepAlive            int `json:"keepalive_seconds"`  // of silence until a client is asked whether it is there
	Drain                int `json:"drain_milliseconds"` // left to connections when the program is stopped

	DebugHost string `json:"debug_server_host"`
	DebugPort int    `json:"debug_server_port"` // debug, metrics, health and status
	LogLevel  string `json:"log_level"`         // debug, info, warn, error
}

// DefaultConfig returns the values that hold for keys a file leaves out.
func DefaultConfig() Config {
	return Config{
		EndpointDir: "/run/silk/endpoints", CertificateFile: "instance.crt", KeyFile: "instance.key", NamesURL: "http://127.0.0.1:8056", StateDir: "/var/lib/silk/tls",
		PolicyAgent: "127.0.0.1:8721", ConnectTimeout: 250, HandshakeTimeout: 10, Handshakes: 4, Unfinished: 1024, ContainerConnections: 32768, Connections: 65536,
		KeepAlive: 60, Drain: 300, DebugHost: "127.0.0.1", DebugPort: 8057, LogLevel: "info",
	}
}

// Load reads the file at path over the defaults. Warnings are for the log. What is wrong with the content is fault.Invalid.
func Load(path string) (c Config, warnings []string, err error) {
	c = DefaultConfig()
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, nil, fmt.Errorf("could not read config file %s: %w", path, err)
	}
	warnings, err = config.Parse(b, &c)
	switch {
	case err != nil && !json.Valid(b):
		return Config{}, nil, fmt.Errorf("could not read config file: unmarshaling contents: %w", err)
	case err != nil:
		return Config{}, nil, fmt.Errorf("could not read config file: invalid config: %w", err)
	}
	return c, warnings, nil
}

// Validate implements config.Validator.
func (c *Config) Validate(p *config.Problems) {
	p.Require("endpoint_dir", c.EndpointDir != "", "a path")
	p.Require("debug_server_host", c.DebugHost != "", "an address such as 127.0.0.1")
	switch c.Certificates {
	case FromDirectory:
		c.validateDirectory(p)
	case FromAuthority:
		c.validateAuthority(p)
	default:
		p.Addf("certificates", "%q: expected %s or %s", c.Certificates, FromAuthority, FromDirectory)
	}
	if c.PolicyAgent != "" {
		_, err := c.agent()
		p.Check("policy_agent", err)
	}
	for _, n := range []struct {
		path            string
		value, min, max int
	}{
		{"connect_timeout_milliseconds", c.ConnectTimeout, 1, 60_000}, {"handshake_timeout_seconds", c.HandshakeTimeout, 1, 600},
		{"max_handshakes_per_container", c.Handshakes, 1, 1024}, {"max_unfinished_handshakes_per_container", c.Unfinished, 4, 1 << 20},
		{"max_connections_per_container", c.ContainerConnections, 4, 1 << 20}, {"max_connections", c.Connections, 4, 1 << 20},
		{"keepalive_seconds", c.KeepAlive, 1, 32767}, {"drain_milliseconds", c.Drain, 0, 600_000}, {"debug_server_port", c.DebugPort, 1, 65535},
	} {
		if n.value < n.min || n.value > n.max {
			p.Addf(n.path, "%d: expected %d to %d", n.value, n.min, n.max)
		}
	}
	if _, ok := service.ParseLevel(c.LogLevel); !ok && c.LogLevel != "" {
		p.Addf("log_level", "%q: expected debug, info, warn or error", c.LogLevel)
	}
}

func (c *Config) validateDirectory(p *config.Problems) {
	_, _, err := splitTemplate(c.CertificateDirectory)
	p.Check("certificate_directory", err)
	for _, f := range []struct{ path, name string }{{"certificate_file", c.CertificateFile}, {"key_file", c.KeyFile}} {
		p.Require(f.path, filepath.IsLocal(f.name) && f.name != "." && !strings.ContainsAny(f.name, "/\x00"), "the name of a file in certificate_directory")
	}
	if c.TrustDomain != "" {
		_, err := authority.ParseTrustDomain(c.TrustDomain)
		p.Check("trust_domain", err)
	}
}

func (c *Config) validateAuthority(p *config.Problems) {
	u, err := url.Parse(c.ServerURL)
	p.Require("connectivity_server_url", err == nil && u.Scheme == "https" && u.Host != "", "a URL such as https://silk-controller.service.cf.internal:4103")
	p.Require("ca_cert_file", c.CACertFile != "", "a path")
	p.Require("client_cert_file", c.ClientCertFile != "", "a path")
	p.Require("client_key_file", c.ClientKeyFile != "", "a path")
	p.Require("state_dir", c.StateDir != "", "a path")
	_, err = netip.ParseAddr(c.UnderlayIP)
	p.Check("underlay_ip", err)
	if c.NamesURL != "" {
		_, err := c.namesPort()
		p.Check("names_url", err)
	}
	if c.ClientCAFile != "" {
		p.Addf("client_ca_file", "means nothing with certificates %q: clients are verified with the same authority", FromAuthority)
	}
}

// agent returns the address of the policy agent's debug server. What is asked there is at a local socket beside it (policyhttp.PeerSocket).
func (c *Config) agent() (netip.AddrPort, error) {
	a, err := netip.ParseAddrPort(c.PolicyAgent)
	if err != nil || a.Addr() != netip.AddrFrom4([4]byte{127, 0, 0, 1}) || a.Port() == 0 {
		return netip.AddrPort{}, fmt.Errorf("%q: expected 127.0.0.1 and the port of the policy agent's debug server, such as 127.0.0.1:8721, or nothing", c.PolicyAgent)
	}
	return a, nil
}

// namesPort returns the port of silk-dns's debug server. What is asked there is at a local socket beside it (registrationhttp.NamesSocket).
func (c *Config) namesPort() (uint16, error) {
	rest, ok := strings.CutPrefix(strings.TrimSuffix(c.NamesURL, "/"), "http://127.0.0.1:")
	port, err := strconv.ParseUint(rest, 10, 16)
	if !ok || err != nil || port == 0 {
		return 0, fmt.Errorf("%q: expected http://127.0.0.1 and the port of the debug server of this host's silk-dns, such as http://127.0.0.1:8056, or nothing", c.NamesURL)
	}
	return uint16(port), nil
}

func (c *Config) connectTimeout() time.Duration {
	return time.Duration(c.ConnectTimeout) * time.Millisecond
}

func (c *Config) handshakeTimeout() time.Duration {
	return time.Duration(c.HandshakeTimeout) * time.Second
}

func (c *Config) drain() time.Duration { return time.Duration(c.Drain) * time.Millisecond }

// keepAlive asks a silent client a few times, and then gives it up: after twice the time, or a minute more.
func (c *Config) keepAlive() net.KeepAliveConfig {
	idle := time.Duration(c.KeepAlive) * time.Second
	return net.KeepAliveConfig{Enable: true, Idle: idle, Interval: min(max(idle/4, time.Second), 15*time.Second), Count: 4}
}

func (c *Config) debugAddress() string {
	return net.JoinHostPort(c.DebugHost, strconv.Itoa(c.DebugPort))
}
