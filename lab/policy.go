package lab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"github.com/containernetworking/cni/libcni"
)

// Policy says whether a lab's containers are closed to each other until a policy opens them.
type Policy string

// The two ways.
const (
	PolicyRequired Policy = "required" // with a policy-server and an agent on each host
	PolicyNone     Policy = "none"     // without: every container reaches every other one
)

// programs returns the names of the programs that a lab runs.
func (p Policy) programs() []string {
	all := []string{"silk", "silk-controller", "silk-daemon", "silk-cni", "silk-teardown"}
	if p == PolicyRequired {
		all = append(all, "policy-server", "vxlan-policy-agent")
	}
	return all
}

// The ports of the policy programs.
const (
	policyPort   = 4002 // of policy-server's external API
	internalPort = 4003
	forcePort    = 8722 // of the agent, as the next one
	agentPort    = 8721
)

// groups are the applications that the containers of a new lab belong to by turns.
var groups = []string{"web", "api"}

// refusal is what a connection says that policy refuses.
var refusal = syscall.ECONNREFUSED.Error()

// checkGroup refuses what no group can be called, or the plugin would take for a template.
func checkGroup(g string) error {
	if len(g) > 200 || g == "" || strings.ContainsFunc(g, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`,"\$`, r) }) {
		return fault.Invalidf("group %q: expected 1 to 200 letters, digits and marks without white space, comma, dollar or quotes", g)
	}
	return nil
}

// policyKeys are the network configuration's of a host with policy.
var policyKeys = map[string]any{"policy": "required", "policy_agent_force_poll_address": fmt.Sprintf("127.0.0.1:%d", forcePort)}

// inGroup returns a network configuration for a container of a group. Without it the group is the network's name, as for containers of other
// runtimes on the host.
func inGroup(list *libcni.NetworkConfigList, group string) (*libcni.NetworkConfigList, error) {
	var c struct {
		Version string           `json:"cniVersion"`
		Name    string           `json:"name"`
		Plugins []map[string]any `json:"plugins"`
	}
	if err := json.Unmarshal(list.Bytes, &c); err != nil {
		return nil, err
	}
	for _, p := range c.Plugins {
		p["policy_group"] = group
	}
	b, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	return libcni.ConfListFromBytes(b)
}

// policed reports whether the lab has policy.
func (s *supervisor) policed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.j.Policy == PolicyRequired
}

// writePolicyServer writes policy-server's configuration and the file of who may change policies.
func (n *node) writePolicyServer(tls map[string]any) error {
	token, err := n.s.token()
	if err != nil {
		return err
	}
	sum := sha256.Sum256([]byte(token))
	tokens := filepath.Join(n.dir(), "tokens.json")
	err = writeJSON(tokens, map[string]any{"tokens": []any{map[string]any{"name": "lab", "sha256": hex.EncodeToString(sum[:]), "admin": true}}})
	if err != nil {
		return err
	}
	return writeJSON(filepath.Join(n.dir(), "policy-server.json"), tls, map[string]any{
		"listen_host": address(0).String(), "listen_port": policyPort, "enable_tls": true, "token_file": tokens,
		"internal_listen_port": internalPort, "bind_underlay_to_certificate": true, "log_level": "info",
		"database": map[string]any{"type": "sqlite", "path": filepath.Join(n.dir(), "policy-server.db")},
	})
}

// writeAgent writes the configuration of a host's policy agent.
func (n *node) writeAgent(tls map[string]any) error {
	var dns []string
	if n.s.named() {
		dns = []string{resolverAddress.String()}
	}
	return writeJSON(filepath.Join(n.dir(), "policy-agent.json"), tls, map[string]any{
		"dns_servers":       dns,
		"policy_server_url": fmt.Sprintf("https://%v:%d", address(0), internalPort), "underlay_ips": []string{address(n.index).String()},
		"overlay_network": Overlay.String(), "endpoint_dir": "/run/silk/endpoints", "state_dir": filepath.Join(n.dir(), "policy-state"),
		"debug_server_port": agentPort, "force_policy_poll_cycle_port": forcePort, "enable_asg_syncing": n.s.outside != nil,
	})
}

// token returns the bearer token of the lab's admin.
func (s *supervisor) token() (string, error) { return s.secret("policy-token") }

// policyEnv returns what silk policy needs to know on a host: how to reach policy-server, as its admin. Containers do not get it.
func (s *supervisor) policyEnv(where string) []string {
	if _, err := s.hostOf(where); err == nil || !s.policed() {
		return nil
	}
	token, err := s.token()
	if err != nil {
		return nil
	}
	return []string{
		fmt.Sprintf("SILK_POLICY_SERVER=https://%v:%d", address(0), policyPort), "SILK_POLICY_TOKEN=" + token, "SILK_POLICY_CA=" + s.ca.CertFile(),
	}
}

// health returns how a program of the host says it stands, at its debug port.
func (n *node) health(ctx context.Context, port int) (state, reason string) {
	var h struct {
		Status  string   `json:"status"`
		Reasons []string `json:"reasons"`
	}
	err := n.ask(ctx, port, "/health", &h)
	var se *httpjson.StatusError
	if err != nil && !(errors.As(err, &se) && se.Status == http.StatusServiceUnavailable) {
		return NoAnswer, ""
	}
	if len(h.Reasons) > 0 {
		reason = h.Reasons[0]
	}
	return h.Status, reason
}

// label returns a container's name, with its group where groups matter.
func (c Container) label(s Status) string {
	if s.Policy != PolicyRequired || c.Group == "" {
		return c.Name
	}
	return c.Name + "(" + c.Group + ")"
}

// label is that of a container by its name.
func (s Status) label(name string) string {
	for _, c := range s.Containers {
		if c.Name == name {
			return c.label(s)
		}
	}
	return name
}

// heading is the first line of the matrix.
func (s Status) heading(names []string) string {
	var b strings.Builder
	for _, n := range names {
		b.WriteString("\t" + s.label(n))
	}
	return b.String() + "\n"
}

// Group returns the policy group of a container, "" if there is no such container.
func (s Status) Group(container string) string {
	for _, c := range s.Containers {
		if c.Name == container {
			return c.Group
		}
	}
	return ""
}
