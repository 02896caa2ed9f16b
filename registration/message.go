package registration

import (
	"encoding/json"
	"iter"
	"math"
	"net/netip"
	"strconv"
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

// Bounds of a message. Sources send two names of a container in some hundred bytes.
const (
	MaxMessage = 256 << 10 // bytes
	MaxURIs    = 1024
)

// Message is what a source says of one container: that it is, or is no longer, called by the names.
type Message struct {
	Host netip.Addr // of the container; zero when an unregistration does not say
	URIs []string   // its names as they were written; Registrations reads them
	Registration
}

// wire is the message as JSON. Sources write more keys; they are passed over. Keys that the deployed controller reads have to be of their
// types, as there; with another one that is not of its type the message is worth no less than without it.
type wire struct {
	Host      string   `json:"host"`
	URIs      []string `json:"uris"`
	UpdatedNS int64    `json:"endpoint_updated_at_ns"`

	Port     number `json:"port"`
	App      text   `json:"app"`
	Endpoint text   `json:"private_instance_id"`
	Index    number `json:"private_instance_index"` // a text in which a number is, by emitters; a number too
	Zone     text   `json:"availability_zone"`
}

// text is a string, or "" if it is anything else or too long.
type text string

// UnmarshalJSON implements json.Unmarshaler.
func (t *text) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) != nil || len(s) > MaxText {
		s = ""
	}
	*t = text(s)
	return nil
}

// number is a whole number of at most 31 bits plus one, so that missing is 0: 3 and "3" are 4, anything else is 0.
type number uint32

// UnmarshalJSON implements json.Unmarshaler.
func (n *number) UnmarshalJSON(b []byte) error {
	var s string
	if json.Unmarshal(b, &s) != nil {
		s = string(b)
	}
	*n = 0
	if v, err := strconv.ParseUint(s, 10, 31); err == nil && v < math.MaxInt32 {
		*n = number(v) + 1
	}
	return nil
}

// ParseMessage reads the payload of a register message, as encoding/json reads it: keys in any case, the last of several, others passed
// over. What has no host or no names is fault.Invalid, as for the deployed controller, and so is a host that is no address; what is
// beyond MaxMessage or MaxURIs is fault.Exhausted.
func ParseMessage(b []byte) (Message, error) {
	m, host, err := parse(b)
	if err != nil {
		return Message{}, err
	}
	if !m.Host.IsValid() {
		return Message{}, fault.Invalidf("message has host %.40q: expected an IP address", host)
	}
	return m, nil
}

// ParseUnregister reads the payload of an unregister message. It differs from ParseMessage in that the host may be missing, or be no
// address: such a message is good and removes nothing, as at the deployed controller, where it asks for a registration at a host that
// none can have.
func ParseUnregister(b []byte) (Message, error) {
	m, _, err := parse(b)
	return m, err
}

func parse(b []byte) (m Message, host string, err error) {
	if len(b) > MaxMessage {
		return Message{}, "", fault.Exhaustedf("message has %d bytes: expected at most %d", len(b), MaxMessage)
	}
	var w wire
	if err := json.Unmarshal(b, &w); err != nil {
		return Message{}, "", fault.Invalidf("message is no JSON of a registration: %w", err)
	}
	switch {
	case len(w.URIs) == 0:
		return Message{}, "", fault.Invalidf("message of host %.40q has no uris: expected at least one name", w.Host)
	case len(w.URIs) > MaxURIs:
		return Message{}, "", fault.Exhaustedf("message of host %.40q has %d uris: expected at most %d", w.Host, len(w.URIs), MaxURIs)
	}
	m = Message{URIs: w.URIs}
	if a, err := netip.ParseAddr(w.Host); err == nil && a.Zone() == "" {
		m.Host = a.Unmap()
	}
	m.Address, m.Endpoint, m.Zone, m.Group, m.Index = m.Host, string(w.Endpoint), string(w.Zone), string(w.App), int(w.Index)-1
	if w.Port > 0 && w.Port-1 <= math.MaxUint16 {
		m.Port = uint16(w.Port - 1)
	}
	if w.UpdatedNS > 0 {
		m.Updated = time.Unix(0, w.UpdatedNS)
	}
	return m, w.Host, nil
}

// Registrations returns what the message says of each of its names, told of at seen. A name that cannot be read comes as an error,
// fault.Invalid, in its place, and harms no other.
func (m Message) Registrations(seen time.Time) iter.Seq2[Registration, error] {
	return func(yield func(Registration, error) bool) {
		for _, uri := range m.URIs {
			r := m.Registration
			r.Seen = seen
			var err error
			if r.Name, err = ParseName(uri); err != nil {
				r = Registration{}
			}
			if !yield(r, err) {
				return
			}
		}
	}
}
