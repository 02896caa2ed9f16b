package flow

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// Format is how records are written, one JSON object a line.
type Format uint8

// The formats. The last two are those of the deployed iptables-logger, which writes a line when a packet is logged and none at the end of a connection.
const (
	Lines   Format = iota // all that is known, one line for a connection: when it was refused, or when it has ended
	RFC3339               // of the deployed logger with log_timestamp_format "rfc3339"
	Epoch                 // of the deployed logger otherwise
)

var formats = [...]string{Lines: "silk", RFC3339: "rfc3339", Epoch: "deprecated"}

// String returns "silk", "rfc3339" or "deprecated".
func (f Format) String() string {
	if int(f) < len(formats) {
		return formats[f]
	}
	return "unknown"
}

// ParseFormat is the inverse of String. Anything else is fault.Invalid.
func ParseFormat(s string) (Format, error) {
	for i, name := range formats {
		if name == s {
			return Format(i), nil
		}
	}
	return 0, fault.Invalidf("format %.20q: expected %s", s, strings.Join(formats[:], ", "))
}

// Writes reports whether a record has a line in this format. begun says that beginnings have one of their own.
func (f Format) Writes(r *Record, begun bool) bool {
	if f != Lines {
		return r.Event != Ended
	}
	return r.Event != Begun || r.EndUnknown || begun
}

// Site is the host that records are of.
type Site struct{ IP, GUID string }

// Append appends the line of a record, with its newline.
func (f Format) Append(b []byte, s Site, r *Record) []byte {
	switch f {
	case RFC3339:
		b = append(b, `{"timestamp":"`...)
		b = appendTime(b, r.Time)
		b = append(b, `","level":"info","source":"`+lagerSource+`","message":"`...)
		b = appendMessage(b, r)
		b = append(b, `","data":`...)
	case Epoch:
		b = append(b, `{"timestamp":"`...)
		b = strconv.AppendInt(b, r.Time.Unix(), 10)
		b = append(b, '.')
		b = appendNanos(b, r.Time)
		b = append(b, `","source":"`+lagerSource+`","message":"`...)
		b = appendMessage(b, r)
		b = append(b, `","log_level":1,"data":`...)
	default:
		return append(appendRecord(b, s, r), '\n')
	}
	return append(appendLager(b, s, r), "}\n"...)
}

const lagerSource = "cfnetworking.iptables"

func appendMessage(b []byte, r *Record) []byte {
	b = append(b, lagerSource+"."...)
	b = append(b, r.direction()...)
	if r.Verdict == Accepted {
		return append(b, "-allowed"...)
	}
	return append(b, "-denied"...)
}

func (r *Record) direction() string {
	if r.Ingress {
		return "ingress"
	}
	return "egress"
}

// appendLager appends the data that the deployed logger writes: the packet, and the container of this host.
func appendLager(b []byte, s Site, r *Record) []byte {
	if r.Ingress {
		b = append(b, `{"destination":{`...)
		b = append(appendParty(b, s, r.To), `},"packet":`...)
		return append(appendPacket(b, r), '}')
	}
	b = append(b, `{"packet":`...)
	b = append(appendPacket(b, r), `,"source":{`...)
	return append(appendParty(b, s, r.From), "}}"...)
}

// appendParty appends the fields that the deployed logger has for a container.
func appendParty(b []byte, s Site, p *Party) []byte {
	if p == nil {
		p = &Party{}
	}
	b = appendString(append(b, `"container_id":`...), p.Container)
	b = appendString(append(b, `,"app_guid":`...), p.App)
	b = appendString(append(b, `,"space_guid":`...), p.Space)
	b = appendString(append(b, `,"organization_guid":`...), p.Org)
	b = appendString(append(b, `,"host_ip":`...), s.IP)
	return appendString(append(b, `,"host_guid":`...), s.GUID)
}

// appendPacket appends the fields that the deployed logger has for a packet, as the kernel's log spells them.
func appendPacket(b []byte, r *Record) []byte {
	from, to := r.Packet.ports()
	typ, code := r.Packet.ICMP()
	b = append(b, `{"direction":"`...)
	b = append(b, r.direction()...)
	b = append(b, `","allowed":`...)
	b = strconv.AppendBool(b, r.Verdict == Accepted)
	b = r.Packet.Source.Addr().AppendTo(append(b, `,"src_ip":"`...))
	b = r.Packet.Destination.Addr().AppendTo(append(b, `","dst_ip":"`...))
	b = strconv.AppendUint(append(b, `","src_port":`...), uint64(from), 10)
	b = strconv.AppendUint(append(b, `,"dst_port":`...), uint64(to), 10)
	b = append(b, `,"protocol":"`...)
	b = append(b, strings.ToUpper(ProtocolName(r.Packet.Protocol))...)
	b = append(b, `","mark":"`...)
	if r.Mark != 0 {
		b = strconv.AppendUint(append(b, "0x"...), uint64(r.Mark), 16)
	}
	b = strconv.AppendUint(append(b, `","icmp_type":`...), uint64(typ), 10)
	b = strconv.AppendUint(append(b, `,"icmp_code":`...), uint64(code), 10)
	return append(b, '}')
}

// appendRecord appends all that is known.
func appendRecord(b []byte, s Site, r *Record) []byte {
	b = append(b, `{"time":"`...)
	b = appendTime(b, r.Time)
	b = append(b, `","event":"`...)
	b = append(b, r.Event.String()...)
	b = append(b, `","verdict":"`...)
	b = append(b, r.Verdict.String()...)
	b = append(b, `","scope":"`...)
	b = append(b, r.Scope.String()...)
	b = appendString(append(b, `","reason":`...), r.Why)
	b = appendPacket(append(b, `,"packet":`...), r)
	b = appendSide(append(b, `,"source":{`...), s, r.From, r.FromGroup)
	if r.Tag != 0 {
		b = append(b, `,"tag":"`...)
		b = append(append(b, r.Tag.String()...), '"')
	}
	b = appendSide(append(b, `},"destination":{`...), s, r.To, r.ToGroup)
	b = append(b, '}')
	if r.Event != Refused && !r.Start.IsZero() {
		b = append(appendTime(append(b, `,"begun":"`...), r.Start), '"')
	}
	if r.EndUnknown {
		b = append(b, `,"end_unknown":true`...)
	} else if r.Event == Ended {
		if !r.Last.IsZero() {
			b = append(appendTime(append(b, `,"ended":"`...), r.Last), '"')
			b = strconv.AppendFloat(append(b, `,"duration_seconds":`...), r.Duration().Seconds(), 'f', 6, 64)
		}
		b = appendTraffic(append(b, `,"sent":`...), r.Sent)
		b = appendTraffic(append(b, `,"received":`...), r.Heard)
	}
	return append(b, '}')
}

// appendSide appends one end of a connection. Of one on another host the group is all that is known.
func appendSide(b []byte, s Site, p *Party, group string) []byte {
	if p != nil {
		b = append(appendParty(b, s, p), ',')
	}
	return appendString(append(b, `"group":`...), group)
}

func appendTraffic(b []byte, n Traffic) []byte {
	b = strconv.AppendUint(append(b, `{"packets":`...), n.Packets, 10)
	return append(strconv.AppendUint(append(b, `,"bytes":`...), n.Bytes, 10), '}')
}

// appendTime appends a time of UTC with nine digits of the second, as the deployed programs do.
func appendTime(b []byte, t time.Time) []byte {
	t = t.UTC()
	b = t.AppendFormat(b, "2006-01-02T15:04:05.")
	return append(appendNanos(b, t), 'Z')
}

func appendNanos(b []byte, t time.Time) []byte {
	n := t.Nanosecond()
	for unit := 100_000_000; unit > 0; unit /= 10 {
		b = append(b, byte('0'+n/unit%10))
	}
	return b
}

// appendString appends a string of JSON.
func appendString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			var quoted bytes.Buffer
			e := json.NewEncoder(&quoted)
			e.SetEscapeHTML(false)
			if err := e.Encode(s); err != nil {
				return append(b, `""`...)
			}
			return append(b, bytes.TrimSuffix(quoted.Bytes(), []byte("\n"))...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}
