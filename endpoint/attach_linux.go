package endpoint

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// Spec says what to attach and how.
type Spec struct {
	Key
	Path      string       // of the container's network namespace
	Namespace *kernel.NS   // the same, open
	Subnet    netip.Prefix // this host's, to take the address from
	Requested netip.Addr   // the address to have, zero for any
	Until     time.Time    // when Subnet has to be asked for again, zero for never
	MTU       int          // bytes, 68 to 65535

	// Ask, if it is there, is called for Subnet and MTU, once Attach has prepared all that needs neither. If it fails, Attach
	// fails with that, unless the attachment exists with nothing missing: then it needs neither.
	Ask func() (subnet netip.Prefix, mtu int, err error)

	Group    string          // policy group
	Metadata json.RawMessage // a JSON object or nothing
	PortMaps []PortMap
	Limits   *Limits         // nil for none; an attachment that exists keeps its own
	NetOut   json.RawMessage // a JSON list of egress rules, or nothing, which is not an empty list

	Advertise *Advertisement // nil for none
	TLS       []TLSListener
}

// Attach gives the container its interface, address, routes and record, in the host namespace of the calling thread. If the
// attachment exists and s asks for nothing else, Attach makes whole what is missing of it. Then it calls more, which
// may be nil, while the endpoint is still locked; if that fails, a new attachment is undone.
//
// ErrLate: a new attachment had to wait until Subnet was too old to take an address from. fault.Exhausted: the subnet is full. Conflict: the attachment exists with another configuration, or the requested
// address or the interface's name is taken. Invalid: s can never be attached. After an error nothing is left of a new
// attachment, or what could not be undone is still recorded, for Detach.
func (d *Dir) Attach(ctx context.Context, s Spec, more func(Record) error) (Record, error) {
	id, err := s.Namespace.ID()
	if err != nil {
		return Record{}, err
	}
	host, err := kernel.Dial(nil)
	if err != nil {
		return Record{}, err
	}
	defer host.Close()
	runtime.LockOSThread() // for Visit; the first time in a process that starts a thread
	defer runtime.UnlockOSThread()
	if s.Ask != nil {
		if s.Subnet, s.MTU, err = s.Ask(); err != nil {
			return d.attached(ctx, host, s, id, more, err)
		}
	}
	s.Subnet = s.Subnet.Masked()
	s.NetOut = compact(s.NetOut)
	if err := s.validate(); err != nil {
		return Record{}, err
	}
	for {
		h, ix, err := d.reserve(ctx, host, s, id)
		if err != nil {
			return Record{}, err
		}
		r, again, err := d.attach(host, h, ix, s, id, more)
		h.release()
		if !again {
			return r, err
		}
	}
}

// ErrLate is Attach's error when the Spec's time was over before there was an address. Nothing has been done.
var ErrLate = fault.New(fault.Unavailable, errors.New("what is known of this host's subnet is too old by now"))

// attached is Attach on a host that cannot tell its subnet now, because of why.
func (d *Dir) attached(ctx context.Context, host *kernel.Conn, s Spec, id kernel.NSID, more func(Record) error, why error) (Record, error) {
	e, there, err := d.find(s.Key)
	if err != nil || !there {
		return Record{}, errors.Join(why, err)
	}
	h, err := d.hold(ctx, e)
	if err != nil || h == nil {
		return Record{}, errors.Join(why, err)
	}
	defer h.release()
	if h.damaged != nil || h.record.differs(s, id) != "" {
		return Record{}, why
	}
	diffs, err := differences(host, h.record, s.Namespace)
	if err != nil || slices.ContainsFunc(diffs, Difference.severs) {
		return Record{}, errors.Join(why, err)
	}
	return h.record, run(more, h.record)
}

func (s *Spec) validate() error {
	switch {
	case s.Network == "" || s.Container == "" || s.Interface == "" || strings.ContainsAny(s.Network+s.Container, "@/~") || strings.ContainsRune(s.Interface, '/'):
		return fault.Invalidf("endpoint %q on network %q, container %q: expected names as in the CNI specification", s.Interface, s.Network, s.Container)
	case len(s.prefix())+len("255.255.255.255") > maxName:
		return fault.Invalidf("names of network, container and interface are %d bytes long together: expected at most %d", len(s.prefix())-3, maxName-len("255.255.255.255")-3)
	case len(s.Interface) > 15:
		return fault.Invalidf("interface %q: expected at most 15 bytes", s.Interface)
	case s.MTU < 68 || s.MTU > 65535:
		return fault.Invalidf("MTU %d: expected 68 to 65535 bytes", s.MTU)
	case s.Requested.IsValid() && !s.Requested.Is4():
		return fault.Invalidf("requested address %v: expected an IPv4 address", s.Requested)
	}
	if s.Limits != nil {
		if err := s.Limits.Validate(s.MTU); err != nil {
			return err
		}
	}
	return validPorts(s.PortMaps, s.Subnet)
}

// attach wires the endpoint that h holds. again tells that its record was of no use and is gone.
func (d *Dir) attach(host *kernel.Conn, h *hold, ix indexes, s Spec, id kernel.NSID, more func(Record) error) (r Record, again bool, err error) {
	if !h.fresh {
		whole, err := d.resume(host, h, s, id)
		switch {
		case errors.Is(err, errStale):
			return Record{}, true, d.erase(host, h, nil)
		case err != nil:
			return Record{}, false, err
		case whole:
			if err := d.edge(host, h.record); err != nil {
				return Record{}, false, err
			}
			return h.record, false, run(more, h.record)
		}
		now, err := routed(host, h.record.Address())
		if err == nil && now.by != "" {
			err = fault.Conflictf("address %v of endpoint %v is taken by %s", h.record.Address(), h.key, now.by)
		}
		if err != nil {
			return Record{}, false, err
		}
		ix = now.ix
	}
	err = d.wire(host, h.record, ix, s.Namespace)
	if err == nil {
		err = d.edge(host, h.record)
	}
	if err == nil {
		err = run(more, h.record)
	}
	if err == nil {
		return h.record, false, nil
	}
	if errors.Is(err, errNotOurs) {
		return Record{}, false, errors.Join(err, d.forget(h))
	}
	return Record{}, false, errors.Join(err, d.erase(host, h, nil))
}

func run(more func(Record) error, r Record) error {
	if more == nil {
		return nil
	}
	return more(r)
}

// errStale marks a record that is of no use any more.
var errStale = errors.New("stale")

// resume decides what an ADD of a known endpoint means: whole tells that nothing is to be done, an error that it cannot be,
// errStale that the record is to be replaced; otherwise the kernel's objects, none of which is left, are to be made again.
func (d *Dir) resume(host *kernel.Conn, h *hold, s Spec, id kernel.NSID) (whole bool, err error) {
	if h.damaged != nil {
		return false, errStale
	}
	r := h.record
	live, err := exists(host, r.Device)
	if err != nil {
		return false, err
	}
	if diff := r.differs(s, id); diff != "" {
		if !live {
			return false, errStale // its namespace is gone and took the devices along
		}
		return false, fault.Conflictf("endpoint %v exists with another %s: detach it first", r.Key, diff)
	}
	if live {
		diffs, err := differences(host, r, s.Namespace)
		if err != nil {
			return false, err
		}
		if !slices.ContainsFunc(diffs, Difference.severs) {
			return true, nil
		}
	}
	if !s.Subnet.Contains(r.Address()) {
		return false, errStale // the host has another subnet now, and another host may have this one
	}
	if live {
		return false, unwireHost(host, r.Address())
	}
	return false, nil
}

// differs names the first thing in which s is not what r records, "" when there is none. The MTU and the subnet are not
// the runtime's to choose: an endpoint keeps those it has.
func (r Record) differs(s Spec, id kernel.NSID) string {
	switch {
	case r.Namespace != id:
		return fmt.Sprintf("network namespace (%s)", r.Path)
	case r.Group != s.Group:
		return fmt.Sprintf("policy group (%q)", r.Group)
	case !bytes.Equal(r.Metadata, compact(s.Metadata)):
		return "metadata"
	case r.Requested != s.Requested && s.Requested.IsValid() && s.Requested != r.Address():
		return fmt.Sprintf("address (%v)", r.Address())
	case !slices.Equal(r.PortMaps, s.PortMaps):
		return "set of port mappings"
	case !bytes.Equal(r.NetOut, compact(s.NetOut)):
		return "list of egress rules"
	case !r.Advertise.equal(s.Advertise):
		return "set of names"
	case !slices.EqualFunc(r.TLS, s.TLS, TLSListener.equal):
		return "set of ports for TLS"
	}
	return ""
}

func (a *Advertisement) equal(b *Advertisement) bool {
	if a == nil || b == nil {
		return a == b
	}
	index := a.Index == b.Index || a.Index != nil && b.Index != nil && *a.Index == *b.Index
	return index && a.Port == b.Port && slices.Equal(a.Names, b.Names)
}

func (l TLSListener) equal(m TLSListener) bool {
	return l.Listen == m.Listen && l.Forward == m.Forward && l.ClientAuth == m.ClientAuth && slices.Equal(l.ALPN, m.ALPN)
}

// compact returns a value without white space, as records hold it.
func compact(v json.RawMessage) json.RawMessage {
	var b bytes.Buffer
	if len(v) == 0 || json.Compact(&b, v) != nil {
		return v
	}
	return b.Bytes()
}
