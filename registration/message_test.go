package registration_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// messages are payloads as sources send them, and worse.
var messages = []string{
	`{"host":"10.255.0.5","uris":["a.apps.internal","0.a.apps.internal"],"app":"g","private_instance_id":"i","private_instance_index":"0","availability_zone":"z1","endpoint_updated_at_ns":1500000000000000001,"tags":{"component":"route-emitter"},"port":8080}`,
	`{"HOST":"10.255.0.5","Uris":["a"]}`,
	`{"host":"10.255.0.5","uris":["a"],"private_instance_index":3,"port":"8080"}`,
	`{"host":"10.255.0.5","uris":["a"],"app":7,"private_instance_id":[],"private_instance_index":{},"availability_zone":true,"tags":[1],"port":-1}`,
	`{"host":"::ffff:10.255.0.5","uris":["a"]}`, `{"host":"fd00::5","uris":["a"]}`, `{"uris":["a"]}`, `{"host":null,"uris":["a"]}`, `{"host":"x","uris":["a"]}`, `{"host":"fe80::1%eth0","uris":["a"]}`,
	`{"host":"10.255.0.5"}`, `{"host":"10.255.0.5","uris":[]}`, `{"host":"10.255.0.5","uris":null}`, `{"host":"10.255.0.5","uris":"a"}`, `{"host":5,"uris":["a"]}`, `{"host":"10.255.0.5","uris":["a"],"endpoint_updated_at_ns":"1"}`,
	``, `null`, `[]`, `{`, `{"host":"10.255.0.5","uris":["a"]} x`, `{"host":"10.255.0.5","uris":["ok","no no",null,"*.w"]}`,
}

func TestParseMessage(t *testing.T) {
	a := netip.MustParseAddr("10.255.0.5")
	plain := registration.Registration{Address: a, Index: -1}
	with := func(change func(*registration.Registration)) registration.Registration {
		r := plain
		change(&r)
		return r
	}
	for in, want := range map[string]registration.Message{
		messages[0]: {Host: a, URIs: []string{"a.apps.internal", "0.a.apps.internal"}, Registration: registration.Registration{
			Address: a, Port: 8080, Endpoint: "i", Zone: "z1", Group: "g", Updated: time.Unix(1500000000, 1)}},
		messages[1]: {Host: a, URIs: []string{"a"}, Registration: plain},
		messages[2]: {Host: a, URIs: []string{"a"}, Registration: with(func(r *registration.Registration) { r.Index, r.Port = 3, 8080 })},
		messages[3]: {Host: a, URIs: []string{"a"}, Registration: plain},
		messages[4]: {Host: a, URIs: []string{"a"}, Registration: plain},
		`{"host":"10.0.0.1","uris":["b"],"host":"10.255.0.5","Uris":["a"],"port":70000,"private_instance_index":"-1"}`:                         {Host: a, URIs: []string{"a"}, Registration: plain},
		`{"host":"10.255.0.5","uris":["a"],"app":"` + strings.Repeat("g", registration.MaxText+1) + `","port":65535,"availability_zone":null}`: {Host: a, URIs: []string{"a"}, Registration: with(func(r *registration.Registration) { r.Port = 65535 })},
	} {
		got, err := registration.ParseMessage([]byte(in))
		if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", in, err, diff)
		}
		if un, err := registration.ParseUnregister([]byte(in)); err != nil || !cmp.Equal(un, got, cmpopts.EquateComparable(netip.Addr{})) {
			t.Errorf("%s: as what is removed %v, %v", in, un, err)
		}
	}
}

func TestMessagesThatAreRefused(t *testing.T) {
	long := `{"host":"10.255.0.5","uris":["a"` + strings.Repeat(`,"a"`, registration.MaxURIs) + `]}`
	for in, want := range map[string]struct{ register, unregister fault.Kind }{
		`{"uris":["a"]}`:                       {fault.Invalid, 0},
		`{"host":"x","uris":["a"]}`:            {fault.Invalid, 0},
		`{"host":"","uris":["a"]}`:             {fault.Invalid, 0},
		`{"host":"fe80::1%eth0","uris":["a"]}`: {fault.Invalid, 0},
		`{"host":"10.255.0.5"}`:                {fault.Invalid, fault.Invalid},
		`{"host":"10.255.0.5","uris":[]}`:      {fault.Invalid, fault.Invalid},
		`{"host":"10.255.0.5","uris":"a"}`:     {fault.Invalid, fault.Invalid},
		`{"host":5,"uris":["a"]}`:              {fault.Invalid, fault.Invalid},
		``:                                     {fault.Invalid, fault.Invalid},
		`null`:                                 {fault.Invalid, fault.Invalid},
		`{"host":"10.255.0.5","uris":["a"]} x`: {fault.Invalid, fault.Invalid},
		long:                                   {fault.Exhausted, fault.Exhausted},
		strings.Repeat(" ", registration.MaxMessage) + `{"host":"10.255.0.5","uris":["a"]}`: {fault.Exhausted, fault.Exhausted},
	} {
		_, err := registration.ParseMessage([]byte(in))
		m, unErr := registration.ParseUnregister([]byte(in))
		if fault.Of(err) != want.register || fault.Of(unErr) != want.unregister || (unErr == nil) != (want.unregister == 0) {
			t.Errorf("%.60s: %v, removing %v, want %v", in, err, unErr, want)
		}
		if unErr == nil && registration.NewTable().Unregister("a", m.Host) {
			t.Errorf("%.60s: something was removed", in)
		}
	}
}

// TestABadNameHarmsNoOther: nor do names that have no room.
func TestABadNameHarmsNoOther(t *testing.T) {
	m, err := registration.ParseMessage([]byte(messages[len(messages)-1]))
	if err != nil {
		t.Fatal(err)
	}
	table, bad := registration.NewTable(), 0
	for r, err := range m.Registrations(start) {
		if err != nil {
			bad++
			continue
		}
		if _, err := table.Add(r); err != nil {
			t.Error(err)
		}
	}
	if got := fmt.Sprint(table.Names()); got != "[*.w ok]" || bad != 2 {
		t.Errorf("names %s and %d bad ones, want [*.w ok] and 2", got, bad)
	}
	if list, _ := table.Lookup("ok"); len(list) != 1 || !list[0].Seen.Equal(start) {
		t.Errorf("ok is %v", list)
	}
}

func TestRanges(t *testing.T) {
	r := registration.Ranges{netip.MustParsePrefix("10.255.0.0/16"), netip.MustParsePrefix("fd00::/8")}
	for a, want := range map[string]bool{
		"10.255.0.1": true, "::ffff:10.255.0.1": true, "fd00::1": true, "10.254.0.1": false, "8.8.8.8": false, "fd00::1%eth0": false, "::1": false,
	} {
		err := r.Accept(netip.MustParseAddr(a))
		if (err == nil) != want || err != nil && fault.Of(err) != fault.Denied {
			t.Errorf("%s: %v, want it to be accepted: %v", a, err, want)
		}
	}
	for _, a := range []string{"127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.0.2", "255.255.255.255", "::1", "ff02::1", "fe80::1", "::"} {
		if everywhere.Contains(netip.MustParseAddr(a)) {
			t.Errorf("%s is accepted", a)
		}
	}
	if (registration.Ranges{}).Contains(netip.MustParseAddr("10.0.0.1")) || everywhere.Contains(netip.Addr{}) {
		t.Error("no ranges accept something, or no address is accepted")
	}
	table := registration.NewTable()
	table.Register(reg("a", "10.255.0.1", -1))
	table.Register(reg("a", "10.0.0.1", -1))
	table.Register(reg("b", "10.0.0.1", -1))
	if n := table.RemoveOutside(r); n != 2 || fmt.Sprint(table.Names()) != "[a]" {
		t.Errorf("%d registrations were outside, and %v stay", n, table.Names())
	}
}
