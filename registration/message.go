package registration

import (
	"encoding/json"
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// Subjects on NATS (section 11.2 of the contract).
const (
	SubjectRegister   = "service-discovery.register"
	SubjectUnregister = "service-discovery.unregister"
	SubjectGreet      = "service-discovery.greet"
	SubjectStart      = "service-discovery.start"
)

// Message is what a source says of one container: that it is, or is no longer, called by the names.
type Message struct {
	Host netip.Addr // of the container; zero when an unregistration does not say
	URIs []string   // its names as they were written; ParseName each
	Registration
}

// wire is the message as JSON. Sources write more keys; they are passed over.
type wire struct {
	Host      string            `json:"host"`
	URIs      []string          `json:"uris"`
	Port      uint16            `json:"port"`
	App       string            `json:"app"`
	Endpoint  string            `json:"private_instance_id"`
	Index     json.RawMessage   `json:"private_instance_index"` // a text in which a number is, by emitters; a number too
	Zone      string            `json:"availability_zone"`
	UpdatedNS int64             `json:"endpoint_updated_at_ns"`
	Tags      map[string]string `json:"tags"`
}

// ParseMessage reads the payload of a register or unregister message. What has no host or no names is fault.Invalid, as for the deployed controller.
func ParseMessage(b []byte) (Message, error) {
	var w wire
	if err := json.Unmarshal(b, &w); err != nil {
		return Message{}, fault.Invalidf("message is no JSON of a registration: %w", err)
	}
	if w.Host == "" || len(w.URIs) == 0 {
		return Message{}, fault.Invalidf("message has host %.40q and %d uris: expected an address and at least one name", w.Host, len(w.URIs))
	}
	a, err := netip.ParseAddr(w.Host)
	if err != nil {
		return Message{}, fault.Invalidf("message has host %.40q: expected an IP address", w.Host)
	}
	m := Message{Host: a.Unmap(), URIs: w.URIs}
	m.Address, m.Port, m.Endpoint, m.Zone, m.Group, m.Index = m.Host, w.Port, w.Endpoint, w.Zone, w.App, parseIndex(w.Index)
	if w.UpdatedNS > 0 {
		m.Updated = time.Unix(0, w.UpdatedNS)
	}
	return m, nil
}

// parseIndex reads 3 or "3"; -1 for anything else.
func parseIndex(v json.RawMessage) int {
	var text string
	if json.Unmarshal(v, &text) == nil {
		v = json.RawMessage(text)
	}
	var n int
	if json.Unmarshal(v, &n) != nil || n < 0 || len(v) == 0 {
		return -1
	}
	return n
}
