// Package leasehttp is the lease API over HTTP: Handler serves a lease.Registry, Client is one.
//
// Four routes are those of the deployed system and answer as it does, so that old daemons speak to new
// controllers and new daemons to old controllers; GET /v1/leases/watch is ours. docs/api/leases.md shows all of
// them with requests and answers. The package knows no database and no kernel.
//
// Use: service.HTTP("api", ln, tlsConfig, leasehttp.Handler(store, log, leasehttp.HandlerOptions{}), ...) on the one side,
// leasehttp.NewClient(url, tlsConfig, leasehttp.ClientOptions{}) on the other.
package leasehttp

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lease"
)

// The routes.
const (
	PathLeases  = "/leases"
	PathAcquire = "/leases/acquire"
	PathRelease = "/leases/release"
	PathRenew   = "/leases/renew"
	PathWatch   = "/v1/leases/watch"
)

// MaxWait bounds what a caller of PathWatch may wait for; longer waits are cut to it.
const MaxWait = 60 * time.Second

// wireLease is a lease as it is sent. A field that is missing is empty.
type wireLease struct {
	Underlay string `json:"underlay_ip"`
	Subnet   string `json:"overlay_subnet"`
	MAC      string `json:"overlay_hardware_addr"`
}

func wireOf(l lease.Lease) wireLease {
	return wireLease{l.Underlay.String(), l.Subnet.String(), l.MAC.String()}
}

// parse returns the lease that w spells, or as fault.Invalid why it is none.
func (w wireLease) parse() (lease.Lease, error) {
	underlay, err := parseUnderlay(w.Underlay)
	if err != nil {
		return lease.Lease{}, err
	}
	subnet, err := netip.ParsePrefix(w.Subnet)
	if err != nil {
		return lease.Lease{}, fault.Invalidf("overlay subnet %q: expected a network such as 10.255.30.0/24", w.Subnet)
	}
	mac, err := lease.ParseMAC(w.MAC)
	if err != nil {
		return lease.Lease{}, err
	}
	l := lease.Lease{Underlay: underlay, Subnet: subnet, MAC: mac}
	return l, l.Validate()
}

func parseUnderlay(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, fault.Invalidf("underlay address %q: expected an address such as 10.0.16.5", s)
	}
	return a, nil
}

type acquireRequest struct {
	Underlay string `json:"underlay_ip"`
	Single   bool   `json:"single_overlay_ip"`
}

type releaseRequest struct {
	Underlay string `json:"underlay_ip"`
}

// appendLease writes l as JSON. Nothing in a parsed lease needs escaping.
func appendLease(b []byte, l lease.Lease) []byte {
	b = append(b, `{"underlay_ip":"`...)
	b = l.Underlay.AppendTo(b)
	b = append(b, `","overlay_subnet":"`...)
	b = l.Subnet.AppendTo(b)
	b = append(b, `","overlay_hardware_addr":"`...)
	b = append(b, l.MAC.String()...)
	return append(b, `"}`...)
}

// leaseSize is about what one lease takes as JSON.
const leaseSize = 112

func appendLeases(b []byte, ls []lease.Lease) []byte {
	b = append(b, '[')
	for i, l := range ls {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendLease(b, l)
	}
	return append(b, ']')
}

// encodeList returns the body of a list of leases.
func encodeList(ls []lease.Lease) []byte {
	b := make([]byte, 0, len(ls)*leaseSize+16)
	b = append(b, `{"leases":`...)
	return append(appendLeases(b, ls), '}')
}

// encodeUpdate returns the body of an answer to a watch.
func encodeUpdate(u lease.Update) []byte {
	b := make([]byte, 0, (len(u.Set)+len(u.Gone))*leaseSize+192)
	b = append(b, `{"revision":"`...)
	b = append(b, u.Revision.String()...)
	b = append(b, `","full":`...)
	b = strconv.AppendBool(b, u.Full)
	b = append(b, `,"set":`...)
	b = appendLeases(b, u.Set)
	b = append(b, `,"gone":[`...)
	for i, p := range u.Gone {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, '"')
		b = p.AppendTo(b)
		b = append(b, '"')
	}
	b = append(b, `],"count":`...)
	b = strconv.AppendInt(b, int64(u.Count), 10)
	b = append(b, `,"sum":"`...)
	b = append(b, u.Sum...)
	return append(b, `"}`...)
}

// decodeList reads a list of leases. Leases that cannot be used are left out and told of by a *Partial. What is wrong with an
// answer has no kind of its own: fault.Invalid would blame the request.
func decodeList(body []byte) ([]lease.Lease, error) {
	var answer struct {
		Leases []json.RawMessage `json:"leases"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, fmt.Errorf("list of leases is not what was expected: %v", err)
	}
	if answer.Leases == nil {
		return nil, fmt.Errorf("list of leases is not what was expected: there is no member %q", "leases")
	}
	return decodeLeases(answer.Leases)
}

// decodeUpdate reads an answer to a watch, with a *Partial as decodeList.
func decodeUpdate(body []byte) (lease.Update, error) {
	var answer struct {
		Revision lease.Revision    `json:"revision"`
		Full     bool              `json:"full"`
		Set      []json.RawMessage `json:"set"`
		Gone     []netip.Prefix    `json:"gone"`
		Count    int               `json:"count"`
		Sum      string            `json:"sum"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return lease.Update{}, fmt.Errorf("change of leases is not what was expected: %v", err)
	}
	if answer.Revision.IsZero() {
		return lease.Update{}, fmt.Errorf("change of leases is not what was expected: there is no member %q", "revision")
	}
	set, err := decodeLeases(answer.Set)
	return lease.Update{
		Revision: answer.Revision, Full: answer.Full, Set: set, Gone: answer.Gone, Count: answer.Count, Sum: answer.Sum,
	}, err
}

func decodeLeases(raw []json.RawMessage) ([]lease.Lease, error) {
	good := make([]lease.Lease, 0, len(raw))
	var bad []Skipped
	for _, r := range raw {
		var w wireLease
		l, err := lease.Lease{}, json.Unmarshal(r, &w)
		if err == nil {
			l, err = w.parse()
		}
		if err != nil {
			bad = append(bad, skip(w, err))
			continue
		}
		good = append(good, l)
	}
	if bad != nil {
		return good, &Partial{bad}
	}
	return good, nil
}
