package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// The program cni-wrapper-plugin is silk-cni for configurations of the plugin of that name that is deployed around silk-cni: it reads the
// wrapper's keys, and what is in delegate is silk-cni's configuration. It keeps the wrapper's store of metadata. What the wrapper made of its
// other keys were iptables rules; they are the policy agent's and the address translation's now, which have them of their own
// configurations. So those keys are judged as ever, and then pass.

// wrapper is the wrapper's configuration.
type wrapper struct {
	Datastore      string          `json:"datastore"`
	DatastoreOwner string          `json:"datastore_file_owner"`
	DatastoreGroup string          `json:"datastore_file_group"`
	IPTablesLock   string          `json:"iptables_lock_file"`
	Delegate       json.RawMessage `json:"delegate"`
	Instance       string          `json:"instance_address"`
	UnderlayIPs    []string        `json:"underlay_ips"`
	IngressTag     string          `json:"ingress_tag"`
	VTEP           string          `json:"vtep_name"`
	DeniedLogs     int             `json:"iptables_denied_logs_per_sec"`
	AcceptedLogs   int             `json:"iptables_accepted_udp_logs_per_sec"`
	DNSServers     []string        `json:"dns_servers"`
	TCPServices    []string        `json:"host_tcp_services"`
	UDPServices    []string        `json:"host_udp_services"`
	DenyNetworks   struct {
		Always  []string `json:"always"`
		Running []string `json:"running"`
		Staging []string `json:"staging"`
	} `json:"deny_networks"`
	PolicyAgent string `json:"policy_agent_force_poll_address"`
	Outbound    struct {
		Burst int `json:"burst"`
		Rate  int `json:"rate_per_sec"`
	} `json:"outbound_connections"`

	unreadable bool // it does not say which network it is about
}

// RunWrapper is Run for the program cni-wrapper-plugin.
func RunWrapper(ctx context.Context, env Env) int {
	return run(ctx, &call{env: env, wrapper: new(wrapper)})
}

// codeWrapper is that of the wrapper's own failures.
const codeWrapper = 999

// unwrap makes silk-cni's configuration of the wrapper's. What undoes takes what it can read.
func (c *call) unwrap(strict bool) error {
	w := c.wrapper
	failed := func(err error) error {
		return &failure{code: codeWrapper, msg: err.Error()}
	}
	err := json.Unmarshal(c.input, w)
	if err != nil && strict {
		return failed(fmt.Errorf("loading wrapper config: %w", err))
	}
	if strict {
		if err := w.validate(); err != nil {
			return failed(err)
		}
	}
	outer := members(c.input)
	inner := members(w.Delegate)
	w.unreadable = inner == nil
	if inner == nil {
		inner = map[string]json.RawMessage{}
	}
	for k, v := range outer {
		if own := slices.Contains(fromWrapper, k); own || inner[k] == nil && slices.Contains(unlessInDelegate, k) {
			inner[k] = v
		}
	}
	if !strict {
		c.makeReadable(inner)
	}
	w.mapAtInstance(inner)
	if inner["cniVersion"] == nil {
		inner["cniVersion"] = json.RawMessage(`"1.0.0"`)
	}
	if c.input, err = json.Marshal(inner); err != nil {
		return failed(err)
	}
	return nil
}

// fromWrapper are the keys that the runtime writes beside the wrapper's; unlessInDelegate those of silk-cni's that the wrapper may have.
var (
	fromWrapper      = []string{"cniVersion", "runtimeConfig", "prevResult", "metadata", "cni.dev/valid-attachments", "cni.dev/attachments"}
	unlessInDelegate = []string{"name", "policy", "policy_group", "policy_timeout_seconds", "policy_agent_force_poll_address", "no_masquerade_cidr_range", "advertise", "tls", "dns"}
)

// members returns the members of a JSON object under the names that we know them by, nil if it is none.
func members(object []byte) map[string]json.RawMessage {
	var m map[string]json.RawMessage
	if json.Unmarshal(object, &m) != nil || m == nil {
		return nil
	}
	for k, v := range m {
		for _, known := range slices.Concat(fromWrapper, unlessInDelegate) {
			if k != known && strings.EqualFold(k, known) {
				delete(m, k)
				m[known] = v
			}
		}
	}
	return m
}

// makeReadable gives an operation that undoes a version and a name that it can work with.
func (c *call) makeReadable(cfg map[string]json.RawMessage) {
	var version, name string
	json.Unmarshal(cfg["cniVersion"], &version)
	json.Unmarshal(cfg["name"], &name)
	if c.command == "DEL" && !slices.Contains(supported, version) {
		cfg["cniVersion"] = nil
	}
	if !endpoint.ValidID(name) {
		cfg["name"] = json.RawMessage(`"cni-wrapper"`)
		c.wrapper.unreadable = true
	}
}

// mapAtInstance makes port maps without an address those of the instance's address, as the wrapper's are.
func (w *wrapper) mapAtInstance(cfg map[string]json.RawMessage) {
	var runtime map[string]json.RawMessage
	if json.Unmarshal(cfg["runtimeConfig"], &runtime) != nil || isNull(runtime["portMappings"]) {
		return
	}
	var list []map[string]json.RawMessage
	at, err := json.Marshal(w.Instance)
	if err != nil || json.Unmarshal(runtime["portMappings"], &list) != nil {
		return // what is wrong with it is said by who reads it
	}
	for _, m := range list {
		if m == nil {
			return
		}
		has := false
		for k := range m {
			has = has || strings.EqualFold(k, "hostIP")
		}
		if !has {
			m["hostIP"] = at
		}
	}
	if runtime["portMappings"], err = json.Marshal(list); err != nil {
		return
	}
	if b, err := json.Marshal(runtime); err == nil {
		cfg["runtimeConfig"] = b
	}
}

// validate judges what an ADD needs, in the order and with the words of the deployed wrapper. It has no more than one word for all.
func (w *wrapper) validate() error {
	var delegate struct {
		Type string `json:"type"`
	}
	if !isNull(w.Delegate) {
		if err := json.Unmarshal(w.Delegate, &delegate); err != nil {
			return fmt.Errorf("loading wrapper config: %w", err)
		}
	}
	for _, r := range []struct {
		wrong bool
		text  string
	}{
		{w.Datastore == "", "missing datastore path"}, {w.IPTablesLock == "", "missing iptables lock file path"},
		{delegate.Type == "", "delegate config is missing type"}, {w.Instance == "", "missing instance address"},
		{len(w.UnderlayIPs) == 0, "missing underlay ips"}, {w.IngressTag == "", "missing ingress tag"}, {w.VTEP == "", "missing vtep device name"},
		{w.DeniedLogs < 1, "invalid denied logs per sec"}, {w.AcceptedLogs < 1, "invalid accepted udp logs per sec"},
		{w.Outbound.Burst < 1, "invalid outbound connection burst"}, {w.Outbound.Rate < 1, "invalid outbound connection rate"},
		{w.PolicyAgent == "", "validator: PolicyAgentForcePollAddress: zero value"},
		{delegate.Type != "" && delegate.Type != "silk-cni", fmt.Sprintf("delegate %q: expected silk-cni", delegate.Type)},
		{!strings.HasPrefix(w.Datastore, "/"), fmt.Sprintf("datastore %q: expected an absolute path", w.Datastore)},
	} {
		if r.wrong {
			return errors.New(r.text)
		}
	}
	return w.validateAddresses()
}

// validateAddresses judges what the wrapper looked into when it made rules.
func (w *wrapper) validateAddresses() error {
	for _, s := range w.DNSServers {
		if _, err := netip.ParseAddr(s); err != nil {
			return fmt.Errorf("invalid DNS server %q, must be valid IP address", s)
		}
	}
	for _, l := range []struct {
		protocol string
		services []string
	}{{"tcp", w.TCPServices}, {"udp", w.UDPServices}} {
		for _, s := range l.services {
			if _, err := netip.ParseAddrPort(s); err != nil {
				return fmt.Errorf("input rules: host %s services: address %s: expected an address and a port such as 10.0.16.15:8080", l.protocol, s)
			}
		}
	}
	for _, s := range slices.Concat(w.DenyNetworks.Always, w.DenyNetworks.Running, w.DenyNetworks.Staging) {
		if _, err := netip.ParsePrefix(s); err != nil {
			return fmt.Errorf("deny networks: invalid CIDR address: %s", s)
		}
	}
	_, _, err := w.owner()
	return err
}

// answer returns the result of an ADD. The wrapper's servers stand in place of those that the key dns has, as ever; the rest of it stays.
func (c *call) answer(r endpoint.Record) result {
	out := resultOf(c.cfg.CNIVersion, r, c.netns)
	out.DNS = c.cfg.dns
	if c.wrapper != nil && len(c.wrapper.DNSServers) > 0 {
		var d resultDNS
		if out.DNS != nil {
			d = *out.DNS
		}
		d.Nameservers = c.wrapper.DNSServers
		out.DNS = &d
	}
	return out
}

// detachAnywhere detaches the container's interface from whatever networks it is attached to: the configuration does not tell which.
func (c *call) detachAnywhere(ctx context.Context, dir *endpoint.Dir, ns *kernel.NS) error {
	records, bad, err := dir.List()
	if err != nil {
		return failed("list endpoints", err)
	}
	keys := []endpoint.Key{c.key()}
	for _, r := range records {
		keys = append(keys, r.Key)
	}
	for _, b := range bad {
		keys = append(keys, b.Key)
	}
	var errs []error
	for _, k := range keys {
		if k.Container == c.container && k.Interface == c.ifname {
			errs = append(errs, c.detach(ctx, dir, k, ns))
		}
	}
	return errors.Join(errs...)
}
