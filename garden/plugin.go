package garden

import (
	"cmp"
	"encoding/json"
	"net/netip"

	"code.cloudfoundry.org/silk/endpoint"
	"github.com/containernetworking/cni/libcni"
)

// pluginKeys are what the configurations of silk-cni and cni-wrapper-plugin tell about where things are.
type pluginKeys struct {
	Type        string      `json:"type"`
	EndpointDir string      `json:"endpointDir"`
	PolicyAgent string      `json:"policy_agent_force_poll_address"`
	Policy      string      `json:"policy"`
	Instance    string      `json:"instance_address"` // of the wrapper: where ports lead to containers
	Delegate    *pluginKeys `json:"delegate"`         // of the wrapper: silk-cni's
}

// ours returns the keys of our plugin in a list, which may be nil; zero when it has none.
func ours(list *libcni.NetworkConfigList) pluginKeys {
	if list == nil {
		return pluginKeys{}
	}
	for _, p := range list.Plugins {
		var k pluginKeys
		if json.Unmarshal(p.Bytes, &k) != nil || k.Type != "silk-cni" && k.Type != "cni-wrapper-plugin" {
			continue
		}
		if d := k.Delegate; d != nil {
			k.EndpointDir = d.EndpointDir
			k.Policy, k.PolicyAgent = cmp.Or(d.Policy, k.Policy), cmp.Or(d.PolicyAgent, k.PolicyAgent)
		}
		return k
	}
	return pluginKeys{}
}

// instance returns the address that ports are mapped at, zero for all of the host.
func (k pluginKeys) instance() netip.Addr {
	if k.Type != "cni-wrapper-plugin" {
		return netip.Addr{}
	}
	a, _ := netip.ParseAddr(k.Instance) // one that is none has failed the up
	return a
}

// endpointDir returns where the records of endpoints are.
func endpointDir(list *libcni.NetworkConfigList) string {
	if k := ours(list); k.EndpointDir != "" {
		return k.EndpointDir
	}
	return endpoint.DefaultDir
}
