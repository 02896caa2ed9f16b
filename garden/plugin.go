package garden

import (
	"encoding/json"

	"code.cloudfoundry.org/silk/endpoint"
	"github.com/containernetworking/cni/libcni"
)

// pluginKeys are what the configurations of silk-cni and cni-wrapper-plugin tell about where things are.
type pluginKeys struct {
	Type        string      `json:"type"`
	EndpointDir string      `json:"endpointDir"`
	PolicyAgent string      `json:"policy_agent_force_poll_address"`
	Policy      string      `json:"policy"`
	Delegate    *pluginKeys `json:"delegate"` // of the wrapper: silk-cni's
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
		if k.Delegate != nil {
			k.EndpointDir = k.Delegate.EndpointDir
		}
		return k
	}
	return pluginKeys{}
}

// endpointDir returns where the records of endpoints are.
func endpointDir(list *libcni.NetworkConfigList) string {
	if k := ours(list); k.EndpointDir != "" {
		return k.EndpointDir
	}
	return endpoint.DefaultDir
}
