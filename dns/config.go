package dns

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/registration"
)

// Form says whose configuration file it is, which decides what address and port are of.
type Form int

// The forms.
const (
	Own        Form = iota // ours: it has domains
	Controller             // the deployed service-discovery-controller's: the lookup API
	Adapter                // the deployed bosh-dns-adapter's: its API, in front of a lookup API elsewhere
)

// String names the form as people know it.
func (f Form) String() string {
	return [...]string{"silk-dns", "service-discovery-controller", "bosh-dns-adapter"}[f]
}

// Config is the configuration file. Its keys are those of the deployed service-discovery-controller and of the deployed bosh-dns-adapter, each of whose
// files is one for this program, and optional ones of ours. docs/operate/dns.md explains each. Numbers of intervals are seconds.
type Config struct {
	Address           string   `json:"address"` // of the lookup API; of the adapter's API in an adapter's file
	Port              string   `json:"port"`    // "0": any free one
	CACert            string   `json:"ca_cert"` // PEM, as all files
	LogLevelAddress   string   `json:"log_level_address"`
	LogLevelPort      int      `json:"log_level_port"` // 0: there is no such listener
	ReadHeaderTimeout Duration `json:"read_header_timeout"`
	MetronPort        *int     `json:"metron_port"`          // judged, and otherwise unused
	MetricsEmit       *int     `json:"metrics_emit_seconds"` // likewise

	ServerCert    string `json:"server_cert"` // of the lookup API
	ServerKey     string `json:"server_key"`
	Index         string `json:"index"`                        // of this instance, in its id on NATS
	Staleness     int    `json:"staleness_threshold_seconds"`  // after which goes what is not told of again
	Pruning       int    `json:"pruning_interval_seconds"`     // between two looks for what is stale
	ResumePruning int    `json:"resume_pruning_delay_seconds"` // of unbroken connection before anything goes; also how often sources are to tell
	WarmDuration  int    `json:"warm_duration_seconds"`        // of unbroken connection after which the table is whole
	NATS          NATS   `json:"nats"`

	ControllerAddress string   `json:"service_discovery_controller_address"` // several are separated by commas
	ControllerPort    string   `json:"service_discovery_controller_port"`
	ClientCert        string   `json:"client_cert"`
	ClientKey         string   `json:"client_key"`
	MeshDomains       []string `json:"internal_service_mesh_domains"` // unused, as in the deployed adapter
	VIPRange          string   `json:"internal_route_vip_range"`      // judged, and otherwise unused, likewise

	AdapterAddress    string   `json:"adapter_address"` // of the adapter's API in front of the own table
	AdapterPort       string   `json:"adapter_port"`
	ListenDNS         []string `json:"listen_dns"`                 // addresses and ports to answer DNS on
	Domains           []string `json:"domains"`                    // whose names are all in the table, or do not exist
	Forward           []string `json:"forward"`                    // resolvers for all other names; none: those are refused
	TTL               int      `json:"ttl_seconds"`                // of answers
	StateDir          string   `json:"state_dir"`                  // "": nothing outlives the process
	AddressRanges     []string `json:"address_ranges"`             // that containers are in: nothing else is believed
	EndpointDir       string   `json:"endpoint_dir"`               // whose containers are advertised; "": none
	AdvertiseInterval int      `json:"advertise_interval_seconds"` // between two registrations of each on NATS
	Zone              string   `json:"availability_zone"`          // of this host, told with what it advertises
	DebugHost         string   `json:"debug_server_host"`
	DebugPort         *int     `json:"debug_server_port"` // nil: there is no such listener
	LogLevel          string   `json:"log_level"`         // debug, info, warn, error

	Form     Form            `json:"-"` // of the file
	Warnings []string        `json:"-"` // of Load, for the log
	Started  func(Addresses) `json:"-"` // called once when everything listens; nil: nobody asks
}

// NATS says where registrations are heard.
type NATS struct {
	Hosts      []NATSHost `json:"hosts"` // none: nothing is heard
	User       string     `json:"user"`
	Password   string     `json:"pass"`
	TLS        bool       `json:"tls_enabled"`
	CACerts    string     `json:"ca_certs"`
	CertChain  string     `json:"cert_chain"`
	PrivateKey string     `json:"private_key"`
}

// NATSHost is one server.
type NATSHost struct {
	Hostname string `json:"hostname"`
	Port     uint16 `json:"port"`
}

// Duration is written as a string such as "30s".
type Duration struct {
	time.Duration
	Given bool // the file says it
}

// UnmarshalJSON implements json.Unmarshaler. Anything but a string is an error, as for the deployed controller.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fault.Invalidf("duration %.40s: expected a string such as \"30s\"", b)
	}
	v, err := time.ParseDuration(s)
	if err != nil || v < 0 {
		return fault.Invalidf("duration %.40q: expected one such as \"30s\"", s)
	}
	d.Duration, d.Given = v, true
	return nil
}

// Names of defaults that depend on the form.
var (
	defaultDomains = []string{"apps.internal"}
	defaultListen  = []string{"169.254.0.2:53"} // containers get it as their resolver
	defaultRanges  = []string{"10.255.0.0/16"}
	// A deployed controller believes every address. Those of nobody in particular are what an overlay can have.
	privateRanges = []string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"}
)

const (
	defaultDebugPort = 8056
	defaultHeader    = 30 * time.Second
)

// DefaultConfig returns the values that hold for keys a file leaves out, whatever its form.
func DefaultConfig() Config {
	return Config{
		Staleness: 180, Pruning: 60, ResumePruning: 60, WarmDuration: 60, AdvertiseInterval: 20,
		StateDir: "/var/lib/silk/dns", DebugHost: "127.0.0.1", LogLevel: "info",
	}
}

// Load reads the file at path over the defaults. What is wrong with its content is fault.Invalid.
func Load(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("read config: %w", err)
	}
	c, err := ParseConfig(b)
	if err != nil {
		return Config{}, fmt.Errorf("invalid config %s: %w", path, err)
	}
	return c, nil
}

// ParseConfig is Load for text at hand. In a file of a deployed program unknown keys are warnings, in one of ours errors.
func ParseConfig(b []byte) (Config, error) {
	c := DefaultConfig()
	var tree map[string]json.RawMessage
	if err := json.Unmarshal(b, &tree); err != nil {
		return Config{}, fault.Invalidf("unmarshal config: not a JSON object: %w", err)
	}
	given := map[string]bool{}
	for k, v := range tree {
		given[strings.ToLower(k)] = string(v) != "null"
	}
	var ignored []string
	if c.Form = formOf(given); c.Form != Own {
		ignored = config.Unknown(tree, &c)
	}
	c.fill(given)
	warnings, err := config.Parse(b, &c, ignored...)
	if err != nil {
		return Config{}, err
	}
	c.Warnings = append(c.Warnings, warnings...)
	return c, nil
}

// formOf tells the form by the keys that a file has.
func formOf(given map[string]bool) Form {
	switch {
	case given["domains"]:
		return Own
	case given["service_discovery_controller_address"]:
		return Adapter
	}
	return Controller
}

// fill sets the defaults that depend on the form.
func (c *Config) fill(given map[string]bool) {
	switch c.Form {
	case Own:
		port := defaultDebugPort
		c.DebugPort, c.ListenDNS, c.AddressRanges = &port, slices.Clone(defaultListen), slices.Clone(defaultRanges)
	case Controller:
		c.AddressRanges = slices.Clone(privateRanges) // decoding writes into it
		if !given["address_ranges"] {
			c.Warnings = append(c.Warnings, "every private address is believed to be a container's: set address_ranges to the overlay network")
		}
	}
	c.Domains = slices.Clone(defaultDomains)
	if c.Form == Own && given["service_discovery_controller_address"] {
		c.Warnings = append(c.Warnings, "names are heard here: service_discovery_controller_address is not asked")
	}
}

// lookupOn reports whether the lookup API is served.
func (c *Config) lookupOn() bool { return c.Form != Adapter && c.ServerCert != "" }

// adapter returns the address and port of the adapter's API, empty when it is not served.
func (c *Config) adapter() (address, port string) {
	if c.Form == Adapter || c.Form == Own && c.ControllerAddress != "" && !c.lookupOn() {
		return c.Address, c.Port
	}
	return c.AdapterAddress, c.AdapterPort
}

// controllers returns the lookup APIs that an adapter asks, as URLs.
func (c *Config) controllers() []string {
	var out []string
	for s := range strings.SplitSeq(c.ControllerAddress, ",") {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, "https://"+net.JoinHostPort(s, c.ControllerPort))
		}
	}
	return out
}

// headerTimeout returns how long a caller may take for a request's header.
func (c *Config) headerTimeout() time.Duration {
	if !c.ReadHeaderTimeout.Given {
		return defaultHeader
	}
	return c.ReadHeaderTimeout.Duration
}

// ranges, listeners, forwards and domains return what Validate has judged.
func (c *Config) ranges() []netip.Prefix {
	var out []netip.Prefix
	for _, s := range c.AddressRanges {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

func addrPorts(list []string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range list {
		if a, err := netip.ParseAddrPort(s); err == nil {
			out = append(out, netip.AddrPortFrom(a.Addr().Unmap(), a.Port()))
		}
	}
	return out
}

func (c *Config) domains() []registration.Name {
	var out []registration.Name
	for _, s := range c.Domains {
		if n, err := registration.ParseName(s); err == nil {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }
