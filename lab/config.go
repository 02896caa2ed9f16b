package lab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
)

const (
	conflistName = "10-silk.conflist" // for the container runtimes that people start on a host
	ownNetwork   = "lab"              // of the lab's own containers
)

// writeConfigs writes the certificates and configurations of the node's programs, and a host's network configuration.
func (n *node) writeConfigs() error {
	if n.isOutside() {
		return nil
	}
	if err := os.MkdirAll(n.dir(), 0o700); err != nil {
		return err
	}
	cert, key, err := n.certificate()
	if err != nil {
		return err
	}
	tls := map[string]any{"ca_cert_file": n.s.ca.CertFile()}
	if !n.isHost() {
		tls["server_cert_file"], tls["server_key_file"] = cert, key
		return n.writeControl(tls, cert, key)
	}
	tls["client_cert_file"], tls["client_key_file"] = cert, key
	return n.writeHost(tls, cert, key)
}

// writeControl writes the configurations of the programs that are not on hosts.
func (n *node) writeControl(tls map[string]any, cert, key string) error {
	if n.s.policed() {
		if err := n.writePolicyServer(tls); err != nil {
			return err
		}
	}
	keys := map[string]any{}
	if n.s.named() {
		keys = n.s.caKeys()
		if err := n.writeNATS(cert, key); err != nil {
			return err
		}
	}
	return writeJSON(filepath.Join(n.dir(), "controller.json"), tls, keys, map[string]any{
		"debug_server_port": 46455, "health_check_port": 19683, "listen_host": address(0).String(), "listen_port": controllerPort,
		"network": Overlay.String(), "subnet_prefix_length": 24, "lease_expiration_seconds": 604800, "staleness_threshold_seconds": 3600,
		"metrics_emit_seconds": 30, "metron_port": 3457, "log_prefix": "cfnetworking", "max_open_connections": 10,
		"max_idle_connections": 10, "connections_max_lifetime_seconds": 3600,
		"database": map[string]any{"type": "sqlite", "path": filepath.Join(n.dir(), "controller.db")},
	})
}

// writeHost writes the configurations of a host's programs and of its networks.
func (n *node) writeHost(tls map[string]any, cert, key string) error {
	err := writeJSON(n.network(), n.networkConfig("1.1.0", ownNetwork)) // not the runtimes': its GC would remove their containers
	if err != nil {
		return err
	}
	err = writeJSON(n.daemonConfig(), tls, map[string]any{
		"underlay_ip": address(n.index).String(), "subnet_prefix_length": 24, "overlay_network": Overlay.String(),
		"health_check_port": daemonPort, "vtep_name": "silk-vtep", "vni": 1, "vtep_port": 4789, "poll_interval": 5,
		"connectivity_server_url": fmt.Sprintf("https://%v:%d", address(0), controllerPort), "debug_server_port": 22233,
		"partition_tolerance_seconds": 604800, "client_timeout_seconds": 5, "metron_port": 3457,
		"log_prefix": "cfnetworking", "log_level": "info", "state_dir": filepath.Join(n.dir(), "state"), "endpoint_dir": "/run/silk/endpoints",
	})
	if err != nil {
		return err
	}
	if n.s.policed() {
		if err := n.writeAgent(tls); err != nil {
			return err
		}
	}
	if n.s.named() {
		if err := errors.Join(n.writeResolverConfig(cert, key), n.writeProxyConfig(tls), n.space.do(n.showRoots)); err != nil {
			return err
		}
	}
	return n.space.do(func() error {
		return writeJSON(filepath.Join(cniConfDir, conflistName), n.networkConfig("1.0.0", "silk")) // what every runtime knows
	})
}

// network is the file with the network configuration of the lab's own containers.
func (n *node) network() string { return filepath.Join(n.dir(), "network.conflist") }

func (n *node) networkConfig(version, name string) map[string]any {
	plugin := map[string]any{"type": "silk-cni", "daemonPort": daemonPort, "endpointDir": "/run/silk/endpoints", "capabilities": map[string]any{"portMappings": true}}
	if n.s.policed() {
		maps.Copy(plugin, policyKeys)
	}
	if n.s.named() {
		maps.Copy(plugin, nameKeys(name == ownNetwork))
	}
	return map[string]any{"cniVersion": version, "name": name, "plugins": []any{plugin}}
}

// certificate returns the node's certificate, issued now if it has none.
func (n *node) certificate() (cert, key string, err error) {
	base := filepath.Join(filepath.Dir(n.s.ca.CertFile()), n.name)
	if _, err := os.Stat(base + ".crt"); err == nil {
		return base + ".crt", base + ".key", nil
	}
	return n.s.ca.Issue(n.name, address(n.index))
}

func writeJSON(path string, parts ...map[string]any) error {
	all := map[string]any{}
	for _, p := range parts {
		maps.Copy(all, p)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false) // nats-server reads no \u003e
	e.SetIndent("", "  ")
	if err := e.Encode(all); err != nil {
		return err
	}
	return writeFile(path, b.Bytes())
}
