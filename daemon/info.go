package daemon

import (
	"net/http"

	"code.cloudfoundry.org/silk/internal/httpjson"
)

// Status is how a host stands.
type Status string

// The statuses, from good to bad. Whoever attaches containers does so with ready and degraded only.
const (
	StatusReady    Status = "ready"    // the lease is confirmed and the kernel agrees with what is wanted
	StatusDegraded Status = "degraded" // it works on what was known last: Reason says what is missing
	StatusStarting Status = "starting" // no lease is held yet: new containers are to be refused (CNI STATUS code 50)
	StatusFenced   Status = "fenced"   // the lease may be or is another's: new containers are to be refused (CNI STATUS code 51)
)

// Network is the answer of GET /v1/network: all that silk-cni needs to know about the host. It is 200 whatever the status;
// other fields than Status, Reason and OverlayNetwork are zero while the host has no lease.
//
// The answer of "/" and of unknown paths is the older {"overlay_subnet":"10.255.30.0/24","mtu":1450}, also 200 always. While the
// status is starting or fenced its overlay_subnet is "", which makes the deployed silk-cni refuse a new container
// (its address management cannot parse it) without anything else noticing.
type Network struct {
	OverlaySubnet  string `json:"overlay_subnet"`  // "10.255.30.0/24", "10.255.0.12/32", of the lost lease when fenced
	OverlayNetwork string `json:"overlay_network"` // "10.255.0.0/16"
	MTU            int    `json:"mtu"`             // of containers: the lower device's less 50
	VTEP           string `json:"vtep"`            // the device's name
	Status         Status `json:"status"`
	Reason         string `json:"reason,omitempty"` // empty when ready
}

// Health is the answer of GET /health and GET /ready.
//
// /health is 200 while the daemon does its work: ready, degraded and fenced are all states that a restart would not mend. It is 503
// when a part of the daemon has stopped making progress. /ready is 200 from the first convergence on
// while the status is ready or degraded, and 503 otherwise.
type Health struct {
	Status  Status   `json:"status"`
	Reasons []string `json:"reasons,omitempty"`
	Peers   int      `json:"peers"` // other hosts that there are paths to
}

// oldInfo is the answer of "/".
type oldInfo struct {
	OverlaySubnet string `json:"overlay_subnet"`
	MTU           int    `json:"mtu"`
}

// view is what the info endpoint tells, at one instant.
type view struct {
	network Network
	health  Health
	ready   bool // converged at least once and not fenced
	alive   bool // every part makes progress
}

// infoHandler serves the info endpoint: every path and method has an answer.
func infoHandler(look func() view, metrics http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/network":
			httpjson.Write(w, http.StatusOK, look().network)
		case "/health":
			v := look()
			httpjson.Write(w, statusOf(v.alive), v.health)
		case "/ready":
			v := look()
			httpjson.Write(w, statusOf(v.ready), v.health)
		case "/metrics":
			metrics.ServeHTTP(w, r)
		default:
			n := look().network
			old := oldInfo{n.OverlaySubnet, n.MTU}
			if n.Status == StatusFenced || n.Status == StatusStarting {
				old.OverlaySubnet = ""
			}
			httpjson.Write(w, http.StatusOK, old)
		}
	})
}

func statusOf(ok bool) int {
	if ok {
		return http.StatusOK
	}
	return http.StatusServiceUnavailable
}
