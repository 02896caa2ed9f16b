package secgroup_test

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/secgroup"
)

func rng(first, last string) secgroup.Range {
	return secgroup.Range{First: netip.MustParseAddr(first), Last: netip.MustParseAddr(last)}
}

var (
	ten   = []secgroup.Range{rng("10.0.0.0", "10.255.255.255")}
	https = []policy.Ports{{First: 443, Last: 443}}
	anyIP = []secgroup.Range{rng("0.0.0.0", "255.255.255.255")}
)

// reading is what becomes of one rule.
type reading struct {
	name, text string
	want       *secgroup.Rule // nil: nobody reads it
	lenient    bool           // only Read takes it
	reason     string         // in Parse's refusal
}

func check(t *testing.T, f secgroup.Form, tests []reading) {
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			text := []byte("[" + tt.text + "]")
			read, problems := f.Read(text)
			parsed, err := f.Parse(text)
			switch {
			case tt.want == nil:
				if len(read) != 0 || len(problems) != 1 || problems[0].Rule != 1 {
					t.Errorf("Read: %v, problems %v: expected the rule to be left out", read, problems)
				}
			case len(problems) != 0:
				t.Errorf("Read: %v", problems)
			default:
				if d := cmp.Diff([]secgroup.Rule{*tt.want}, read, addrs); d != "" {
					t.Errorf("Read (-want +got):\n%s", d)
				}
			}
			if tt.want == nil || tt.lenient {
				if !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), tt.reason) || tt.reason == "" {
					t.Errorf("Parse: %v, %v: expected it to be refused with %q", parsed, err, tt.reason)
				}
				return
			}
			if d := cmp.Diff([]secgroup.Rule{*tt.want}, parsed, addrs); d != "" || err != nil {
				t.Errorf("Parse: %v (-want +got):\n%s", err, d)
			}
		})
	}
}

var addrs = cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmpopts.EquateEmpty()}

func TestCloudControllerForm(t *testing.T) {
	tcp := &secgroup.Rule{Protocol: secgroup.TCP, Destinations: ten, Ports: https}
	icmp := func(typ, code int16) *secgroup.Rule {
		return &secgroup.Rule{Protocol: secgroup.ICMP, Destinations: ten, Type: typ, Code: code}
	}
	check(t, secgroup.CloudController, []reading{
		{name: "tcp", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"443"}`, want: tcp},
		{name: "the seven keys of the internal API", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"443","type":0,"code":0,"description":"","log":false}`, want: tcp},
		{name: "keys in another case", text: `{"Protocol":"tcp","DESTINATION":"10.0.0.0/8","Ports":"443"}`, want: tcp},
		{name: "all", text: `{"protocol":"all","destination":"0.0.0.0/0","ports":"","type":0,"code":0,"log":true,"description":"d"}`,
			want: &secgroup.Rule{Destinations: anyIP, Log: true, Description: "d"}},
		{name: "lists", text: `{"protocol":"udp","destination":"10.1.2.3,10.0.0.0/8,10.0.0.1-10.0.0.9","ports":"53,8000-8100"}`, want: &secgroup.Rule{Protocol: secgroup.UDP,
			Destinations: []secgroup.Range{rng("10.1.2.3", "10.1.2.3"), ten[0], rng("10.0.0.1", "10.0.0.9")}, Ports: []policy.Ports{{First: 53, Last: 53}, {First: 8000, Last: 8100}}}},
		{name: "spaces in ports", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":" 443 "}`, want: tcp},
		{name: "spaces in a range of ports", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"1 - 2, 3"}`,
			want: &secgroup.Rule{Protocol: secgroup.TCP, Destinations: ten, Ports: []policy.Ports{{First: 1, Last: 2}, {First: 3, Last: 3}}}},
		{name: "spaces in destinations", text: `{"protocol":"tcp","destination":" 10.0.0.0 - 10.255.255.255","ports":"443"}`, want: tcp, lenient: true, reason: "has a space"},
		{name: "a space in an address", text: `{"protocol":"tcp","destination":"10.0.0. 1","ports":"443"}`, reason: "has a space"},
		{name: "bits beyond the prefix", text: `{"protocol":"tcp","destination":"10.9.0.1/8","ports":"443"}`, want: tcp, lenient: true, reason: "write 10.0.0.0/8 for the network or 10.9.0.1"},
		{name: "an unknown key", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"443","port":"80"}`, want: tcp, lenient: true, reason: `unknown field "port"`},
		{name: "a type in a rule for tcp", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"443","type":8}`, want: tcp, lenient: true, reason: "only icmp"},
		{name: "one bad destination of two", text: `{"protocol":"tcp","destination":"10.0.0.0/8,nowhere","ports":"443"}`, reason: `"nowhere"`},
		{name: "an empty destination of two", text: `{"protocol":"tcp","destination":"10.0.0.0/8,","ports":"443"}`, reason: "destination is empty"},
		{name: "no destination", text: `{"protocol":"all"}`, reason: "destination is empty"},
		{name: "a range that runs backwards", text: `{"protocol":"all","destination":"10.0.0.9-10.0.0.1"}`, reason: "write 10.0.0.1-10.0.0.9"},
		{name: "half a range", text: `{"protocol":"all","destination":"10.0.0.9-"}`, reason: "expected an IPv4 address"},
		{name: "three ends", text: `{"protocol":"all","destination":"10.0.0.1-10.0.0.2-10.0.0.3"}`, reason: "expected an IPv4 address"},
		{name: "a prefix that is too long", text: `{"protocol":"all","destination":"10.0.0.0/33"}`, reason: "expected an IPv4 address"},
		{name: "zeroes in front", text: `{"protocol":"all","destination":"010.0.0.1"}`, reason: "expected an IPv4 address"},
		{name: "IPv6", text: `{"protocol":"all","destination":"::/0"}`, reason: "IPv6"},
		{name: "IPv6 among IPv4", text: `{"protocol":"all","destination":"10.0.0.1,2001:db8::1"}`, reason: "IPv6"},
		{name: "a range into IPv6", text: `{"protocol":"all","destination":"10.0.0.1-2001:db8::1"}`, reason: "IPv6"},
		{name: "IPv4 in IPv6", text: `{"protocol":"all","destination":"::ffff:10.0.0.1"}`, reason: "IPv6"},
		{name: "a port beyond 65535", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"65979"}`, reason: "within 1-65535"},
		{name: "a range of ports that wraps", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"65000-65600"}`, reason: "within 1-65535"},
		{name: "a range of ports that runs backwards", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"90-80"}`, reason: "within 1-65535"},
		{name: "port 0", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"0-80"}`, reason: "within 1-65535"},
		{name: "a port that is none", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"443,http"}`, reason: `"http"`},
		{name: "an empty port of two", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":"443,"}`, reason: "within 1-65535"},
		{name: "no ports", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":""}`, reason: "ports are missing"},
		{name: "ports as a number", text: `{"protocol":"tcp","destination":"10.0.0.0/8","ports":443}`, reason: "ports"},
		{name: "ports and all", text: `{"protocol":"all","destination":"10.0.0.0/8","ports":"443"}`, reason: "only tcp and udp have ports"},
		{name: "ports and icmp", text: `{"protocol":"icmp","destination":"10.0.0.0/8","ports":"443","type":8,"code":0}`, reason: "only tcp and udp have ports"},
		{name: "an unknown protocol", text: `{"protocol":"sctp","destination":"10.0.0.0/8","ports":"443"}`, reason: "expected tcp, udp, icmp or all"},
		{name: "a protocol in upper case", text: `{"protocol":"TCP","destination":"10.0.0.0/8","ports":"443"}`, reason: "in lower case"},
		{name: "icmp", text: `{"protocol":"icmp","destination":"10.0.0.0/8","type":8,"code":0}`, want: icmp(8, 0)},
		{name: "icmp of code 0 and type 0", text: `{"protocol":"icmp","destination":"10.0.0.0/8","ports":"","type":0,"code":0,"description":"","log":false}`, want: icmp(0, 0)},
		{name: "every icmp", text: `{"protocol":"icmp","destination":"10.0.0.0/8","type":-1,"code":-1}`, want: icmp(-1, -1)},
		{name: "every icmp in eight bits", text: `{"protocol":"icmp","destination":"10.0.0.0/8","type":255,"code":255}`, want: icmp(-1, -1)},
		{name: "every code of a type", text: `{"protocol":"icmp","destination":"10.0.0.0/8","type":8,"code":-1}`, want: icmp(8, -1)},
		{name: "icmp without a type", text: `{"protocol":"icmp","destination":"10.0.0.0/8","code":0}`, reason: "type is missing"},
		{name: "icmp without a code", text: `{"protocol":"icmp","destination":"10.0.0.0/8","type":8,"code":null}`, reason: "code is missing"},
		{name: "an icmp type that wraps", text: `{"protocol":"icmp","destination":"10.0.0.0/8","type":264,"code":0}`, reason: "icmp type 264"},
		{name: "an icmp code below -1", text: `{"protocol":"icmp","destination":"10.0.0.0/8","type":8,"code":-2}`, reason: "icmp code -2"},
		{name: "an icmp type beyond all numbers", text: `{"protocol":"icmp","destination":"10.0.0.0/8","type":1e99,"code":0}`, reason: "type"},
		{name: "null", text: `null`, reason: "null is no rule"},
		{name: "a list", text: `[]`, reason: "array"},
	})
}

func TestGardenForm(t *testing.T) {
	net := `"networks":[{"start":"10.0.0.0","end":"10.255.255.255"}]`
	icmp := func(typ, code int16) *secgroup.Rule {
		return &secgroup.Rule{Protocol: secgroup.ICMP, Destinations: ten, Type: typ, Code: code}
	}
	check(t, secgroup.Garden, []reading{
		{name: "all", text: `{"networks":[{"start":"0.0.0.0","end":"255.255.255.255"}]}`, want: &secgroup.Rule{Destinations: anyIP}},
		{name: "tcp", text: `{"protocol":1,` + net + `,"ports":[{"start":443,"end":443}],"log":true}`, want: &secgroup.Rule{Protocol: secgroup.TCP, Destinations: ten, Ports: https, Log: true}},
		{name: "udp", text: `{"protocol":2,` + net + `,"ports":[{"start":1,"end":65535}]}`,
			want: &secgroup.Rule{Protocol: secgroup.UDP, Destinations: ten, Ports: []policy.Ports{{First: 1, Last: 65535}}}},
		{name: "icmp", text: `{"protocol":3,` + net + `,"icmps":{"type":8,"code":0}}`, want: icmp(8, 0)},
		{name: "every code", text: `{"protocol":3,` + net + `,"icmps":{"type":8,"code":null}}`, want: icmp(8, -1)},
		{name: "every code by 255", text: `{"protocol":3,` + net + `,"icmps":{"type":8,"code":255}}`, want: icmp(8, -1)},
		{name: "every type", text: `{"protocol":3,` + net + `,"icmps":{"type":255,"code":255}}`, want: icmp(-1, -1)},
		{name: "icmps and tcp", text: `{"protocol":1,` + net + `,"ports":[{"start":443,"end":443}],"icmps":{"type":8,"code":0}}`,
			want: &secgroup.Rule{Protocol: secgroup.TCP, Destinations: ten, Ports: https}, lenient: true, reason: "only icmp"},
		{name: "no icmps", text: `{"protocol":3,` + net + `}`, reason: "type is missing"},
		{name: "no type", text: `{"protocol":3,` + net + `,"icmps":{"code":1}}`, reason: "type is missing"},
		{name: "no networks", text: `{"protocol":0}`, reason: "networks are missing"},
		{name: "half a network", text: `{"networks":[{"start":"10.0.0.0"}]}`, reason: "expected an IPv4 address"},
		{name: "a backward network", text: `{"networks":[{"start":"10.0.0.2","end":"10.0.0.1"}]}`, reason: "backwards"},
		{name: "IPv6", text: `{"networks":[{"start":"10.0.0.0","end":"10.0.0.1"},{"start":"::","end":"::1"}]}`, reason: "IPv6"},
		{name: "a network as text", text: `{"networks":["10.0.0.0/8"]}`, reason: "networks"},
		{name: "no ports", text: `{"protocol":1,` + net + `}`, reason: "ports are missing"},
		{name: "ports and all", text: `{` + net + `,"ports":[{"start":443,"end":443}]}`, reason: "only tcp and udp"},
		{name: "port 0", text: `{"protocol":1,` + net + `,"ports":[{"start":0,"end":443}]}`, reason: "within 1-65535"},
		{name: "half a range of ports", text: `{"protocol":1,` + net + `,"ports":[{"start":443}]}`, reason: "start <= end"},
		{name: "a port that wraps", text: `{"protocol":1,` + net + `,"ports":[{"start":65979,"end":65979}]}`, reason: "within 1-65535"},
		{name: "an unknown protocol", text: `{"protocol":4,` + net + `}`, reason: "protocol 4"},
		{name: "a protocol as text", text: `{"protocol":"tcp",` + net + `}`, reason: "protocol"},
	})
	if rules, problems := secgroup.Garden.Read([]byte("null")); len(rules) != 0 || len(problems) != 0 {
		t.Errorf("null: %v, %v: expected no rules", rules, problems)
	}
}

func TestOwnForm(t *testing.T) {
	check(t, secgroup.Own, []reading{
		{name: "tcp", text: `{"protocol":"tcp","destinations":["10.0.0.0/8"],"ports":["443"]}`, want: &secgroup.Rule{Protocol: secgroup.TCP, Destinations: ten, Ports: https}},
		{name: "every icmp", text: `{"protocol":"icmp","destinations":["10.0.0.0/8"]}`,
			want: &secgroup.Rule{Protocol: secgroup.ICMP, Destinations: ten, Type: secgroup.Any, Code: secgroup.Any}},
		{name: "an icmp type", text: `{"protocol":"icmp","destinations":["10.0.0.0/8"],"type":3}`,
			want: &secgroup.Rule{Protocol: secgroup.ICMP, Destinations: ten, Type: 3, Code: secgroup.Any}},
		{name: "a list in a text", text: `{"protocol":"all","destinations":["10.0.0.0/8,10.0.0.1"]}`, reason: "expected an IPv4 address"},
		{name: "no destinations", text: `{"protocol":"all","destinations":[]}`, reason: "destinations are missing"},
		{name: "the key of Cloud Controller", text: `{"protocol":"all","destination":"10.0.0.0/8"}`, reason: "destination"},
		{name: "an empty port", text: `{"protocol":"tcp","destinations":["10.0.0.0/8"],"ports":[""]}`, reason: "within 1-65535"},
	})
}

func TestAListThatIsNone(t *testing.T) {
	for _, f := range []secgroup.Form{secgroup.Own, secgroup.CloudController, secgroup.Garden} {
		for _, text := range []string{``, `{}`, `"x"`, `[`, `[]]`, `[{}`, `tcp`} {
			rules, problems := f.Read([]byte(text))
			if len(rules) != 0 || len(problems) != 1 || problems[0].Rule != 0 {
				t.Errorf("%v %q: %v, %v: expected one problem of the list", f, text, rules, problems)
			}
			if _, err := f.Parse([]byte(text)); !errors.Is(err, fault.Invalid) {
				t.Errorf("%v %q: %v: expected it to be refused", f, text, err)
			}
		}
		if rules, err := f.Parse([]byte("[]")); err != nil || len(rules) != 0 {
			t.Errorf("%v []: %v, %v: expected no rules", f, rules, err)
		}
	}
}

func TestABadRuleLeavesTheOthers(t *testing.T) {
	text := `[{"protocol":"all","destination":"10.0.0.1"},{"protocol":"all","destination":"x"},{"protocol":7},{"protocol":"all","destination":"10.0.0.2"}]`
	rules, problems := secgroup.CloudController.Read([]byte(text))
	if len(rules) != 2 || rules[1].Destinations[0] != rng("10.0.0.2", "10.0.0.2") || len(problems) != 2 || problems[0].Rule != 2 || problems[1].Rule != 3 {
		t.Errorf("rules %v, problems %v: expected the first and the fourth, and two problems", rules, problems)
	}
}

func TestReasonsAreBounded(t *testing.T) {
	long := strings.Repeat("x", 100_000)
	_, err := secgroup.CloudController.Parse([]byte(`[` + strings.Repeat(`{"protocol":"all","destination":"`+long+`"},`, 30) + `{}]`))
	if err == nil || len(err.Error()) > 10_000 || !strings.Contains(err.Error(), "and 11 more") {
		t.Errorf("expected 20 short reasons and a count, got %d bytes: %.300v", len(err.Error()), err)
	}
}

func TestNormalize(t *testing.T) {
	got, problems, err := secgroup.Normalize([]byte(`[{"code":3,"protocol":"tcp","destination":"10.0.0.1, 10.0.0.2","ports":"80","new":1},null,{"ports":80},
		{"protocol":"icmp","destination":"<&>\u2028"}]`))
	want := `[{"protocol":"tcp","destination":"10.0.0.1, 10.0.0.2","ports":"80","type":0,"code":3,"description":"","log":false},` +
		`{"protocol":"icmp","destination":"<&>\u2028","ports":"","description":"","log":false}]`
	if got != want || err != nil || len(problems) != 2 || problems[0].Rule != 2 || problems[1].Rule != 3 {
		t.Errorf("got %s, %v, %v\nexpected %s and problems with the second and the third", got, problems, err, want)
	}
	if _, _, err := secgroup.Normalize([]byte(`{}`)); !errors.Is(err, fault.Invalid) {
		t.Errorf("an object: %v, expected it to be refused", err)
	}
	if again, _, err := secgroup.Normalize([]byte(want)); again != want || err != nil {
		t.Errorf("normalized again: %s, %v", again, err)
	}
}

func FuzzCloudController(f *testing.F) { fuzz(f, secgroup.CloudController) }

func FuzzGarden(f *testing.F) { fuzz(f, secgroup.Garden) }

func FuzzOwn(f *testing.F) { fuzz(f, secgroup.Own) }

// fuzz holds that what parses strictly reads leniently to the same, that what was read means something, and that writing and reading it again, in both forms that
// are written, is identity.
func fuzz(f *testing.F, form secgroup.Form) {
	for _, s := range []string{
		`[{"protocol":"tcp","destination":"10.0.0.0/8,10.0.0.1-10.0.0.9","ports":"443, 8000-8100","type":0,"code":0,"description":"<é>","log":true}]`,
		`[{"protocol":"icmp","destination":"0.0.0.0/0","type":-1,"code":255},{"protocol":"all","destination":"::/0"}]`,
		`[{"protocol":1,"networks":[{"start":"10.0.0.0","end":"10.0.0.7"}],"ports":[{"start":1,"end":65535}],"log":true}]`,
		`[{"protocol":3,"networks":[{"start":"10.0.0.0","end":"10.0.0.6"}],"icmps":{"type":8,"code":null}}]`,
		`[{"protocol":"udp","destinations":["10.0.0.0/8","10.0.0.1-10.0.0.9"],"ports":["53"]},{"protocol":"icmp","destinations":["1.2.3.4"],"code":1}]`,
		`null`, `[null]`, `[[`, `[]`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		read, problems := form.Read(text)
		for _, r := range read {
			valid(t, r)
		}
		for _, p := range problems {
			if !errors.Is(p.Err, fault.Invalid) {
				t.Fatalf("%v is not invalid", p)
			}
		}
		parsed, err := form.Parse(text)
		if err == nil && (len(problems) > 0 || !cmp.Equal(parsed, read, addrs)) {
			t.Fatalf("Parse %v, Read %v with %v", parsed, read, problems)
		}
		again, err := secgroup.CloudController.Parse([]byte(secgroup.Format(read)))
		if err != nil || !cmp.Equal(again, read, addrs) {
			t.Fatalf("written for Cloud Controller: %s, read %v, %v", secgroup.Format(read), again, err)
		}
		b, err := json.Marshal(append([]secgroup.Rule{}, read...)) // none is [], not null
		if err != nil {
			t.Fatal(err)
		}
		if again, err = secgroup.Own.Parse(b); err != nil || !cmp.Equal(again, read, addrs) {
			t.Fatalf("written as our own: %s, read %v, %v", b, again, err)
		}
		if normal, _, err := secgroup.Normalize(text); err == nil && form == secgroup.CloudController {
			again, _ := secgroup.CloudController.Read([]byte(normal))
			if !cmp.Equal(again, read, addrs) {
				t.Fatalf("normalized: %s, read %v, before %v", normal, again, read)
			}
			if twice, _, err := secgroup.Normalize([]byte(normal)); err != nil || twice != normal {
				t.Fatalf("normalized twice: %s, before %s, %v", twice, normal, err)
			}
		}
	})
}

// valid holds what secgroup.Rule says of its fields.
func valid(t *testing.T, r secgroup.Rule) {
	t.Helper()
	ports := r.Protocol == secgroup.TCP || r.Protocol == secgroup.UDP
	if len(r.Destinations) == 0 || ports != (len(r.Ports) > 0) || r.Type < secgroup.Any || r.Type > 254 || r.Code < secgroup.Any || r.Code > 254 {
		t.Fatalf("%+v is no rule", r)
	}
	if r.Protocol != secgroup.ICMP && (r.Type != 0 || r.Code != 0) {
		t.Fatalf("%+v has a type", r)
	}
	for _, d := range r.Destinations {
		if !d.First.Is4() || !d.Last.Is4() || d.Last.Less(d.First) {
			t.Fatalf("%+v is no range", d)
		}
		if again, err := secgroup.ParseRange(d.String()); err != nil || again != d {
			t.Fatalf("range %v read again: %v, %v", d, again, err)
		}
	}
	for _, p := range r.Ports {
		if p.First == 0 || p.Last < p.First {
			t.Fatalf("%v are no ports", p)
		}
	}
}
