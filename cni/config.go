package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
)

// config is the network configuration. Keys that are not ours are the runtime's or another plugin's and are passed over.
type config struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`

	DaemonPort    int             `json:"daemonPort"`  // of silk-daemon on 127.0.0.1
	SubnetFile    string          `json:"subnetFile"`  // read instead of asking the daemon
	MTU           int             `json:"mtu"`         // bytes; 0: the daemon's
	Datastore     string          `json:"datastore"`   // store of earlier releases, kept in step when set
	EndpointDir   string          `json:"endpointDir"` // of records
	Policy        string          `json:"policy"`      // "none" or "required"
	PolicyAgent   string          `json:"policy_agent_force_poll_address"`
	PolicyTimeout int             `json:"policy_timeout_seconds"` // of the wait for the agent; default 5
	PolicyGroup   string          `json:"policy_group"`           // template, see group
	NoMasquerade  string          `json:"no_masquerade_cidr_range"`
	Rate          int             `json:"rate"`  // kilobits (of 1024) a second, in each direction; 0: no limit
	Burst         int             `json:"burst"` // kilobits
	Metadata      json.RawMessage `json:"metadata"`
	Advertise     json.RawMessage `json:"advertise"` // names, see advertise
	TLS           json.RawMessage `json:"tls"`       // ports at which TLS ends, see listener
	DNS           json.RawMessage `json:"dns"`       // of the result
	PrevResult    json.RawMessage `json:"prevResult"`
	RuntimeConfig struct {
		IPs          []string        `json:"ips"`
		PortMappings json.RawMessage `json:"portMappings"`
		Bandwidth    json.RawMessage `json:"bandwidth"`
		NetOutRules  json.RawMessage `json:"netOutRules"` // egress rules as Garden writes them; the policy agent reads them
		MAC          string          `json:"mac"`
	} `json:"runtimeConfig"`

	// The specification calls the key of GC by the first name, libcni at first by the second.
	Valid1 json.RawMessage `json:"cni.dev/valid-attachments"`
	Valid2 json.RawMessage `json:"cni.dev/attachments"`

	noMasquerade []netip.Prefix
	policyAgent  netip.AddrPort
	settings
}

// decode reads a configuration as far as every operation needs it. Lenient, a key of ours with a value of the wrong type is
// as good as absent: what undoes must work with what it can read.
func decode(input []byte, lenient bool) (config, error) {
	var c config
	if c.plain(input) {
		return c.complete()
	}
	c = config{}
	if err := json.Unmarshal(input, &c); err != nil {
		if _, typed := errors.AsType[*json.UnmarshalTypeError](err); !typed || !lenient {
			return config{CNIVersion: c.CNIVersion}, &failure{code: codeDecode, msg: "error unmarshall network config", err: err}
		}
	}
	return c.complete()
}

// complete judges what every operation needs and fills in what is not there.
func (c config) complete() (config, error) {
	if c.CNIVersion == "" {
		c.CNIVersion = "0.1.0" // what the specification takes for granted
	}
	if c.Name == "" {
		return c, &failure{code: codeConfig, msg: "missing network name"}
	}
	if !endpoint.ValidID(c.Name) {
		return c, &failure{code: codeConfig, msg: "invalid characters found in network name", err: fmt.Errorf("name is %q", c.Name)}
	}
	if c.EndpointDir == "" {
		c.EndpointDir = endpoint.DefaultDir
	}
	return c, nil
}

// validate judges what an ADD needs, all of it.
func (c *config) validate() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
	}
	switch {
	case c.SubnetFile == "" && c.DaemonPort == 0:
		bad("daemonPort", "missing: expected the port of silk-daemon, such as 23954, or subnetFile")
	case c.DaemonPort < 0 || c.DaemonPort > 65535:
		bad("daemonPort", "is %d: expected 1 to 65535", c.DaemonPort)
	}
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > maxMTU) {
		bad("mtu", "is %d: expected %d to %d, or 0 for the daemon's", c.MTU, minMTU, maxMTU)
	}
	switch c.Policy {
	case "", "none", "required":
	default:
		bad("policy", "is %q: expected none or required", c.Policy)
	}
	if c.PolicyTimeout == 0 {
		c.PolicyTimeout = 5
	}
	if c.PolicyTimeout < 0 || c.PolicyTimeout > maxPolicyTimeout {
		bad("policy_timeout_seconds", "is %d: expected 1 to %d, or 0 for 5", c.PolicyTimeout, maxPolicyTimeout)
	}
	c.policyAgent = defaultAgent
	if c.PolicyAgent != "" {
		var err error
		if c.policyAgent, err = netip.ParseAddrPort(strings.Replace(c.PolicyAgent, "localhost:", "127.0.0.1:", 1)); err != nil {
			bad("policy_agent_force_poll_address", "is %q: expected an address and a port such as 127.0.0.1:8722", c.PolicyAgent)
		}
	}
	if c.NoMasquerade != "" {
		p, err := netip.ParsePrefix(c.NoMasquerade)
		if err != nil || !p.Addr().Is4() {
			bad("no_masquerade_cidr_range", "is %q: expected an IPv4 network such as 10.255.0.0/16", c.NoMasquerade)
		}
		c.noMasquerade = []netip.Prefix{p}
	}
	if !isNull(c.Metadata) && !strings.HasPrefix(string(bytes.TrimSpace(c.Metadata)), "{") {
		bad("metadata", "is no JSON object")
	}
	for key, v := range map[string]int{"rate": c.Rate, "burst": c.Burst} {
		if v < 0 || int64(v) > maxKilobits {
			bad(key, "is %d: expected 0 to %d kilobits", v, int64(maxKilobits))
		}
	}
	if !objects(c.RuntimeConfig.NetOutRules) {
		bad("runtimeConfig.netOutRules", "is no JSON list of objects")
	}
	c.readSettings(bad)
	for key, path := range map[string]string{"endpointDir": c.EndpointDir, "datastore": c.Datastore, "subnetFile": c.SubnetFile} {
		if path != "" && !filepath.IsAbs(path) {
			bad(key, "is %q: expected an absolute path", path)
		}
	}
	return fault.New(fault.Invalid, errors.Join(errs...))
}

// defaultAgent is where the policy agent listens unless its configuration says otherwise.
var defaultAgent = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 8722)

// maxPolicyTimeout leaves an operation time for the rest, in seconds.
const maxPolicyTimeout = 50

// maxKilobits bounds rate and burst.
const maxKilobits = 1 << 35

// The limits of an MTU are IPv4's.
const (
	minMTU = 68
	maxMTU = 65535
)

// policyRequired reports whether a container must be closed until the policy agent has opened it. Earlier releases knew
// an agent's address only.
func (c *config) policyRequired() bool {
	return c.Policy == "required" || c.Policy == "" && c.PolicyAgent != ""
}

// isNull reports whether a value is absent or null.
func isNull(v json.RawMessage) bool { return len(v) == 0 || string(v) == "null" }

// objects reports whether a value of a configuration, which is JSON, is absent, null or a list of objects. It may be long.
func objects(v json.RawMessage) bool {
	if isNull(v) {
		return true
	}
	if v[0] != '[' {
		return false
	}
	depth, text := 0, false
	for i := 0; i < len(v); i++ {
		switch c := v[i]; {
		case text && c == '\\':
			i++
		case c == '"':
			if text = !text; depth == 1 {
				return false
			}
		case text:
		case c == '{', c == '[' && depth == 0:
			depth++
		case depth == 1 && c > ' ' && c != ',' && c != ']':
			return false
		case c == '[':
			depth++
		case c == '}', c == ']':
			depth--
		}
	}
	return true
}

// requested returns the address that the runtime asks for, zero for any: from the capability "ips" or from CNI_ARGS.
func (c *call) requested() (netip.Addr, error) {
	texts := c.cfg.RuntimeConfig.IPs
	args, err := parseArgs(c.args)
	if err != nil {
		return netip.Addr{}, err
	}
	if ip := args["IP"]; ip != "" && len(texts) == 0 {
		texts = strings.Split(ip, ",")
	}
	if len(texts) == 0 {
		return netip.Addr{}, nil
	}
	var a netip.Addr
	if len(texts) == 1 {
		text, _, _ := strings.Cut(texts[0], "/") // runtimes may give the prefix length along
		a, _ = netip.ParseAddr(strings.TrimSpace(text))
	}
	if !a.Is4() {
		return netip.Addr{}, &failure{code: codeConfig, msg: "invalid requested address", err: fmt.Errorf("requested %q: expected one IPv4 address", texts)}
	}
	return a, nil
}

// parseArgs reads CNI_ARGS: KEY=VALUE;KEY=VALUE. The last of equal keys counts.
func parseArgs(s string) (map[string]string, error) {
	args := map[string]string{}
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		k, v, ok := strings.Cut(pair, "=")
		if !ok || k == "" {
			return nil, &failure{code: codeEnvironment, msg: "invalid " + envArgs, err: fmt.Errorf("%q: expected KEY=VALUE pairs separated by semicolons", pair)}
		}
		args[k] = v
	}
	return args, nil
}

// unsupported refuses what a runtime may ask of a plugin that declares the capability, and we cannot give.
func (c *config) unsupported() error {
	if mac := c.RuntimeConfig.MAC; mac != "" {
		return &failure{code: codeUnsupported, msg: "unsupported field runtimeConfig.mac: " + mac, hint: "take the capability out of silk-cni's configuration and add a plugin that has it to the list"}
	}
	return nil
}
