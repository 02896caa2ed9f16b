package dns

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/dns/dnsserver"
	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/registration"
)

// maxInterval bounds intervals in seconds: a day.
const maxInterval = 86400

// Validate implements config.Validator.
func (c *Config) Validate(p *config.Problems) {
	switch c.Form {
	case Own:
		c.validateOwn(p)
	case Adapter:
		c.validateAdapter(p)
	case Controller:
		if c.Address == "" && c.Port == "" && c.ServerCert == "" {
			p.Addf("domains", "missing: a file of silk-dns has it, such as [\"apps.internal\"]; one of service-discovery-controller or bosh-dns-adapter has their keys")
			return
		}
		c.validateLookup(p)
		if len(c.NATS.Hosts) == 0 {
			c.Warnings = append(c.Warnings, "nats.hosts is empty: no registration will be heard")
		}
	}
	c.validateNumbers(p)
	c.NATS.validate(p)
	c.validateNames(p)
	if _, ok := service.ParseLevel(c.LogLevel); !ok && c.LogLevel != "" {
		p.Addf("log_level", "%q: expected debug, info, warn or error", c.LogLevel)
	}
	if c.VIPRange != "" {
		_, err := netip.ParsePrefix(c.VIPRange)
		p.Check("internal_route_vip_range", err)
	}
}

// validateOwn judges which of the interfaces of the deployed programs are served beside DNS.
func (c *Config) validateOwn(p *config.Problems) {
	p.Require("domains", len(c.Domains) > 0, "domains such as apps.internal")
	p.Require("listen_dns", len(c.ListenDNS) > 0 || c.Port != "" || c.AdapterPort != "", "an address such as 169.254.0.2:53")
	adapterFile := c.ControllerAddress != "" && !c.lookupOn()
	switch {
	case adapterFile:
		c.validateListener(p, "address", c.Address, "port", c.Port)
	case c.Address != "" || c.Port != "" || c.ServerCert != "" || c.ServerKey != "":
		c.validateLookup(p)
	}
	if c.AdapterAddress != "" || c.AdapterPort != "" {
		if adapterFile {
			p.Addf("adapter_address", "is served at address and port already: leave out one of them")
		}
		c.validateListener(p, "adapter_address", c.AdapterAddress, "adapter_port", c.AdapterPort)
	}
	if c.LogLevelPort != 0 {
		p.Require("log_level_address", c.LogLevelAddress != "", "an address such as 127.0.0.1")
	}
}

func (c *Config) validateAdapter(p *config.Problems) {
	c.validateListener(p, "address", c.Address, "port", c.Port)
	p.Require("service_discovery_controller_address", strings.Trim(c.ControllerAddress, ", ") != "", "a name or an address")
	validatePort(p, "service_discovery_controller_port", c.ControllerPort)
	p.Require("client_cert", c.ClientCert != "", "a path")
	p.Require("client_key", c.ClientKey != "", "a path")
	p.Require("ca_cert", c.CACert != "", "a path")
	p.Require("log_level_address", c.LogLevelAddress != "", "an address such as 127.0.0.1")
	p.Require("log_level_port", c.LogLevelPort > 0, "a port")
	if c.ServerCert != "" || len(c.NATS.Hosts) > 0 {
		p.Addf("service_discovery_controller_address", "is for a file of bosh-dns-adapter alone: one that hears names itself has adapter_address and adapter_port instead")
	}
	if len(c.ListenDNS) > 0 || c.EndpointDir != "" || c.AdapterAddress != "" || c.AdapterPort != "" {
		p.Addf("domains", "missing: a file of bosh-dns-adapter has neither listen_dns, endpoint_dir nor adapter_address; one of silk-dns has domains")
	}
}

// validateLookup judges what the lookup API needs.
func (c *Config) validateLookup(p *config.Problems) {
	c.validateListener(p, "address", c.Address, "port", c.Port)
	p.Require("server_cert", c.ServerCert != "", "a path")
	p.Require("server_key", c.ServerKey != "", "a path")
	p.Require("ca_cert", c.CACert != "", "a path")
	if c.Form == Controller && (c.AdapterAddress != "" || c.AdapterPort != "") {
		c.validateListener(p, "adapter_address", c.AdapterAddress, "adapter_port", c.AdapterPort)
	}
	if c.LogLevelPort != 0 {
		p.Require("log_level_address", c.LogLevelAddress != "", "an address such as 127.0.0.1")
	}
}

func (c *Config) validateListener(p *config.Problems, addressKey, address, portKey, port string) {
	p.Require(addressKey, address != "", "an address such as 127.0.0.1")
	validatePort(p, portKey, port)
}

func validatePort(p *config.Problems, key, port string) {
	p.Require(key, port != "", `a port in a string, such as "8054"`)
	if _, err := strconv.ParseUint(port, 10, 16); err != nil && port != "" {
		p.Addf(key, "%.20q: expected a port from 0 to 65535", port)
	}
}

func (c *Config) validateNumbers(p *config.Problems) {
	debug, metron, emit := 0, 1, 1
	for from, to := range map[*int]*int{c.DebugPort: &debug, c.MetronPort: &metron, c.MetricsEmit: &emit} {
		if from != nil {
			*to = *from
		}
	}
	for _, n := range []struct {
		path            string
		value, min, max int
	}{
		{"staleness_threshold_seconds", c.Staleness, 1, maxInterval}, {"pruning_interval_seconds", c.Pruning, 1, maxInterval},
		{"resume_pruning_delay_seconds", c.ResumePruning, 0, maxInterval}, {"warm_duration_seconds", c.WarmDuration, 0, maxInterval},
		{"metrics_emit_seconds", emit, 1, maxInterval}, {"advertise_interval_seconds", c.AdvertiseInterval, 1, maxInterval},
		{"metron_port", metron, 1, 65535}, {"log_level_port", c.LogLevelPort, 0, 65535}, {"debug_server_port", debug, 0, 65535},
		{"ttl_seconds", c.TTL, 0, 7 * maxInterval},
	} {
		if n.value < n.min || n.value > n.max {
			p.Addf(n.path, "%d: expected %d to %d", n.value, n.min, n.max)
		}
	}
	p.Require("debug_server_host", c.DebugHost != "" || c.DebugPort == nil, "an address such as 127.0.0.1")
	if c.EndpointDir != "" && c.AdvertiseInterval >= c.Staleness {
		p.Addf("advertise_interval_seconds", "%d: expected less than staleness_threshold_seconds, %d", c.AdvertiseInterval, c.Staleness)
	}
}

// validateNames judges what DNS answers, and of whom.
func (c *Config) validateNames(p *config.Problems) {
	for i, s := range c.Domains {
		n, err := registration.ParseName(s)
		if err == nil {
			err = dnsserver.CheckDomain(n)
		}
		p.Check(fmt.Sprintf("domains[%d]", i), err)
	}
	here := addrPorts(c.ListenDNS)
	for i, s := range c.ListenDNS {
		if a, ok := validateAddrPort(p, "listen_dns", i, s); ok && a.Port() != 0 && slices.Contains(addrPorts(c.ListenDNS[:i]), a) {
			p.Addf(fmt.Sprintf("listen_dns[%d]", i), "%v is there twice", a)
		}
	}
	for i, s := range c.Forward {
		if a, ok := validateAddrPort(p, "forward", i, s); ok {
			p.Check(fmt.Sprintf("forward[%d]", i), dnsserver.CheckForward(a, here))
		}
	}
	p.Require("address_ranges", len(c.AddressRanges) > 0 || c.Form == Adapter, "networks such as 10.255.0.0/16")
	for i, s := range c.AddressRanges {
		_, err := netip.ParsePrefix(s)
		p.Check(fmt.Sprintf("address_ranges[%d]", i), err)
	}
	if len(c.Zone) > 255 {
		p.Addf("availability_zone", "has %d bytes: expected at most 255", len(c.Zone))
	}
}

// validateAddrPort reads an element of a list of addresses with ports.
func validateAddrPort(p *config.Problems, key string, i int, s string) (netip.AddrPort, bool) {
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		p.Addf(fmt.Sprintf("%s[%d]", key, i), "%.60q: expected an address and a port, such as 10.0.0.2:53", s)
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), err == nil
}

func (n *NATS) validate(p *config.Problems) {
	for i, h := range n.Hosts {
		path := fmt.Sprintf("nats.hosts[%d]", i)
		_, err := url.Parse(h.url(nil))
		p.Require(path+".hostname", err == nil && h.Hostname != "" && !strings.ContainsAny(h.Hostname, "/@,? \t\r\n"), "a name or an address")
		p.Require(path+".port", h.Port > 0, "a port such as 4222")
	}
	if n.User == "" && n.Password != "" {
		p.Addf("nats.user", "missing: there is a nats.pass")
	}
	if !n.TLS {
		return
	}
	if _, err := n.tls(); err != nil {
		p.Addf("nats", "%v", err)
	}
}
