package policyagent

import (
	"encoding/json"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/flow"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policy"
)

// Config is the configuration of vxlan-policy-agent. Durations are in seconds.
type Config struct {
	PolicyServerURL string   `json:"policy_server_url"`                  // of the internal API; several are separated by commas
	CACertFile      string   `json:"ca_cert_file"`                       // PEM, as the next two
	ClientCertFile  string   `json:"client_cert_file"`                   //
	ClientKeyFile   string   `json:"client_key_file"`                    //
	ClientTimeout   int      `json:"client_timeout_seconds"`             // of one call to policy-server
	PollInterval    int      `json:"poll_interval"`                      // between two looks at a server that cannot be watched
	Host            string   `json:"host"`                               // by which policy-server knows this host; default the first of underlay_ips
	UnderlayIPs     []string `json:"underlay_ips"`                       // addresses of this host outside the overlay
	OverlayNetwork  string   `json:"overlay_network"`                    // in CIDR notation
	VTEPName        string   `json:"vtep_name"`                          // of the VXLAN device
	EndpointDir     string   `json:"endpoint_dir"`                       // records of attached containers
	Datastore       string   `json:"cni_datastore_path"`                 // container metadata of the deployed wrapper plugin; "" means none
	StateDir        string   `json:"state_dir"`                          // outlives a reboot
	DebugHost       string   `json:"debug_server_host"`                  //
	DebugPort       int      `json:"debug_server_port"`                  // debug, metrics and health
	ForceHost       string   `json:"force_policy_poll_cycle_host"`       //
	ForcePort       int      `json:"force_policy_poll_cycle_port"`       // what the CNI plugins ask
	LogLevel        string   `json:"log_level"`                          // debug, info, warn, error
	Ingress         bool     `json:"enable_overlay_ingress_rules"`       // containers accept the overlay's routers on their declared ports
	Open            bool     `json:"disable_container_network_policy"`   // everything between containers is allowed
	KeepEstablished bool     `json:"keep_established"`                   // a removed policy does not end connections
	TCPServices     []string `json:"host_tcp_services"`                  // of this host that containers may reach: address:port
	UDPServices     []string `json:"host_udp_services"`                  //
	DNSServers      []string `json:"dns_servers"`                        // link-local ones may be asked by containers
	MaxTag          int      `json:"max_tag"`                            // highest tag to use, where other software needs bits of the mark
	ConnMask        uint32   `json:"conntrack_mark_mask"`                // 16 bits in a row of a connection's mark that tell its source
	C2CLogging      bool     `json:"iptables_c2c_logging"`               // initial value of a switch: see docs/operate/policy-agent.md
	ASGLogging      bool     `json:"iptables_asg_logging"`               // likewise, of connections to the outside of the overlay
	DeniedLogs      int      `json:"iptables_denied_logs_per_sec"`       // lines of the flow log about refusals, for each container
	UDPLogs         int      `json:"iptables_accepted_udp_logs_per_sec"` // and about accepted connections of udp
	FlowLog         FlowLog  `json:"flow_log"`
	ASGSyncing      bool     `json:"enable_asg_syncing"` // containers reach what security groups say, and what the runtime says does not count
	ASGPoll         int      `json:"asg_poll_interval"`  // between two looks at the security groups of a server that cannot be watched

	DenyNetworks DenyNetworks        `json:"deny_networks"`
	Connections  OutboundConnections `json:"outbound_connections"`
}

// DenyNetworks are networks in CIDR notation that containers do not reach, whatever security groups say.
type DenyNetworks struct {
	Always  []string `json:"always"`
	Running []string `json:"running"` // apps and tasks
	Staging []string `json:"staging"`
}

// OutboundConnections limits how often a container begins tcp connections to one port of one address outside the overlay.
type OutboundConnections struct {
	Limit   bool `json:"limit"`
	Logging bool `json:"logging"` // what exceeds the limit
	DryRun  bool `json:"dry_run"` // it is logged, and nothing is refused, whether or not limit is set
	Burst   int  `json:"burst"`
	Rate    int  `json:"rate_per_sec"`
}

// FlowLog says where the flow log's lines go. It is switched on and off by other keys, and at run time.
type FlowLog struct {
	File     string `json:"file"`        // lines are appended to; may be renamed or removed at any time. "" means none: silk flows shows records all the same
	Format   string `json:"format"`      // silk, or rfc3339 or deprecated as of the deployed iptables-logger
	Begun    bool   `json:"begun"`       // with format silk: a line when a connection begins too
	HostIP   string `json:"host_ip"`     // in each line; default host
	HostGUID string `json:"host_guid"`   // likewise; default none
	Group    int    `json:"nflog_group"` // by which the kernel tells of packets, where another program uses ours
}

// maxLogs bounds lines of the flow log a second: what limits more is no limit.
const maxLogs = 1_000_000

// DefaultConfig returns the values that hold for keys a file leaves out.
func DefaultConfig() Config {
	return Config{
		ASGPoll: 60, Connections: OutboundConnections{Burst: 1000, Rate: 100},
		ClientTimeout: 5, PollInterval: 5, OverlayNetwork: "10.255.0.0/16", VTEPName: "silk-vtep", EndpointDir: "/run/silk/endpoints",
		MaxTag: int(identity.MaxTag), ConnMask: 0xffff, StateDir: "/var/lib/silk/policy-agent", DebugHost: "127.0.0.1", DebugPort: 8721, ForceHost: "127.0.0.1", ForcePort: 8722, LogLevel: "info",
		DeniedLogs: 1, UDPLogs: 100, FlowLog: FlowLog{Format: flow.Lines.String(), Group: nft.LogGroup},
	}
}

// ignored are keys that existing deployments render and that mean nothing here.
var ignored = []string{
	"vni", "metron_address", "iptables_lock_file", "log_prefix", "loggregator",
}

// Load reads the file at path over the defaults. Warnings are for the log. What is wrong with the content is fault.Invalid.
func Load(path string) (c Config, warnings []string, err error) {
	c = DefaultConfig()
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, nil, fmt.Errorf("could not read config file %s: %w", path, err)
	}
	warnings, err = config.Parse(b, &c, ignored...)
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
	for _, s := range c.servers() {
		u, err := url.Parse(s)
		p.Require("policy_server_url", err == nil && u.Scheme == "https" && u.Host != "", "a URL such as https://policy-server.service.cf.internal:4003")
	}
	p.Require("ca_cert_file", c.CACertFile != "", "a path")
	p.Require("client_cert_file", c.ClientCertFile != "", "a path")
	p.Require("client_key_file", c.ClientKeyFile != "", "a path")
	p.Require("endpoint_dir", c.EndpointDir != "", "a path")
	p.Require("state_dir", c.StateDir != "", "a path")
	p.Require("debug_server_host", c.DebugHost != "", "an address such as 127.0.0.1")
	p.Require("force_policy_poll_cycle_host", c.ForceHost != "", "an address such as 127.0.0.1")
	p.Require("vtep_name", c.VTEPName != "" && len(c.VTEPName) < 16 && !strings.ContainsAny(c.VTEPName, "/ \t\n:%"),
		"a device name of at most 15 characters")
	overlay, err := netip.ParsePrefix(c.OverlayNetwork)
	p.Require("overlay_network", err == nil && overlay.Addr().Is4(), "an IPv4 network such as 10.255.0.0/16")
	for i, s := range c.UnderlayIPs {
		_, err := netip.ParseAddr(s)
		p.Check(fmt.Sprintf("underlay_ips[%d]", i), err)
	}
	p.Require("host", c.name() != "", "the underlay address of this host, or underlay_ips with it")
	if len(c.name()) > identity.MaxGroup {
		p.Addf("host", "has %d bytes: expected at most %d", len(c.name()), identity.MaxGroup)
	}
	if bits.OnesCount32(c.ConnMask) != 16 || c.ConnMask>>bits.TrailingZeros32(c.ConnMask) != 0xffff {
		p.Addf("conntrack_mark_mask", "%#x: expected 16 bits in a row, such as 65535", c.ConnMask)
	}
	if c.DeniedLogs < 0 || c.DeniedLogs > maxLogs { // deployed agents take 0
		p.Addf("iptables_denied_logs_per_sec", "%d: expected 0 to %d", c.DeniedLogs, maxLogs)
	}
	_, err = flow.ParseFormat(c.FlowLog.Format)
	p.Check("flow_log.format", err)
	_, errs := c.services()
	for path, err := range errs {
		p.Check(path, err)
	}
	c.DenyNetworks.check(p)
	for i, s := range c.DNSServers {
		_, err := netip.ParseAddr(s)
		p.Check(fmt.Sprintf("dns_servers[%d]", i), err)
	}
	for _, n := range []struct {
		path       string
		value, max int
	}{
		{"debug_server_port", c.DebugPort, 65535}, {"force_policy_poll_cycle_port", c.ForcePort, 65535},
		{"iptables_accepted_udp_logs_per_sec", c.UDPLogs, maxLogs}, {"flow_log.nflog_group", c.FlowLog.Group, 65535},
		{"asg_poll_interval", c.ASGPoll, 86400}, {"outbound_connections.burst", c.Connections.Burst, maxConnections}, {"outbound_connections.rate_per_sec", c.Connections.Rate, maxConnections},
		{"poll_interval", c.PollInterval, 86400}, {"client_timeout_seconds", c.ClientTimeout, 3600}, {"max_tag", c.MaxTag, int(identity.MaxTag)},
	} {
		if n.value < 1 || n.value > n.max {
			p.Addf(n.path, "%d: expected 1 to %d", n.value, n.max)
		}
	}
	if _, ok := service.ParseLevel(c.LogLevel); !ok && c.LogLevel != "" {
		p.Addf("log_level", "%q: expected debug, info, warn or error", c.LogLevel)
	}
}

// maxConnections bounds what a limit of connections can be.
const maxConnections = 1_000_000

// check judges the networks.
func (d DenyNetworks) check(p *config.Problems) {
	for _, l := range []struct {
		key  string
		list []string
	}{{"always", d.Always}, {"running", d.Running}, {"staging", d.Staging}} {
		for i, s := range l.list {
			n, err := netip.ParsePrefix(s)
			p.Require(fmt.Sprintf("deny_networks.%s[%d]", l.key, i), err == nil && n.Addr().Is4(), "an IPv4 network such as 10.0.0.0/8")
		}
	}
}

// limit returns how connections to the outside are limited.
func (c Config) limit() firewall.Limit {
	o := c.Connections
	if !o.Limit && !o.DryRun {
		return firewall.Limit{}
	}
	return firewall.Limit{Rate: o.Rate, Burst: o.Burst, Log: o.Logging, Dry: o.DryRun}
}

// servers returns the URLs of the policy-servers.
func (c Config) servers() []string {
	var out []string
	for s := range strings.SplitSeq(c.PolicyServerURL, ",") {
		out = append(out, strings.TrimSuffix(strings.TrimSpace(s), "/"))
	}
	return out
}

func (c Config) logGroup() uint16 { return uint16(c.FlowLog.Group) }

// name returns by which name policy-server knows this host.
func (c Config) name() string {
	if c.Host == "" && len(c.UnderlayIPs) > 0 {
		return c.UnderlayIPs[0]
	}
	return c.Host
}

// services returns the ports of this host that containers may reach, and what cannot be read by its path.
func (c Config) services() (out []firewall.Service, errs map[string]error) {
	errs = map[string]error{}
	for _, l := range []struct {
		key   string
		proto policy.Protocol
		list  []string
	}{{"host_tcp_services", policy.TCP, c.TCPServices}, {"host_udp_services", policy.UDP, c.UDPServices}} {
		for i, s := range l.list {
			a, err := netip.ParseAddrPort(s)
			if err == nil && (!a.Addr().Is4() || a.Port() == 0) {
				err = fmt.Errorf("%q: expected an IPv4 address and a port, such as 10.0.16.5:8080", s)
			}
			if err != nil {
				errs[fmt.Sprintf("%s[%d]", l.key, i)] = err
				continue
			}
			out = append(out, firewall.Service{Protocol: l.proto, Address: a.Addr(), Port: a.Port()})
		}
	}
	return out, errs
}

// dns returns the name servers of containers.
func (c Config) dns() []netip.Addr {
	var out []netip.Addr
	for _, s := range c.DNSServers {
		if a, err := netip.ParseAddr(s); err == nil {
			out = append(out, a)
		}
	}
	return out
}

// overlay returns the overlay network, masked.
func (c Config) overlay() netip.Prefix {
	p, _ := netip.ParsePrefix(c.OverlayNetwork)
	return p.Masked()
}

func (c Config) poll() time.Duration    { return time.Duration(c.PollInterval) * time.Second }
func (c Config) timeout() time.Duration { return time.Duration(c.ClientTimeout) * time.Second }

func (c Config) debugAddress() string {
	return net.JoinHostPort(c.DebugHost, strconv.Itoa(c.DebugPort))
}
func (c Config) forceAddress() string {
	return net.JoinHostPort(c.ForceHost, strconv.Itoa(c.ForcePort))
}

// certificates names the files of the client's side of mutual TLS.
func (c Config) certificates() service.Certificates {
	return service.Certificates{CA: c.CACertFile, Cert: c.ClientCertFile, Key: c.ClientKeyFile}
}
