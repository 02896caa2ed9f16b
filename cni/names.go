package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/plainjson"
	"code.cloudfoundry.org/silk/registration/name"
)

// advertise is the key of that name: by which names the container is to be found.
type advertise struct {
	Domain string          `json:"domain"` // that names without a final dot are below
	Names  []string        `json:"names"`  // templates, see expand
	Group  bool            `json:"group"`  // the policy group is a name, too
	Port   int             `json:"port"`   // for SRV answers
	Index  json.RawMessage `json:"index"`  // a number, or a template that becomes one
}

// listener is an element of the key tls: a port at which TLS ends.
type listener struct {
	Listen     int      `json:"listen"`
	Forward    int      `json:"forward"`
	ALPN       []string `json:"alpn"`
	ClientAuth bool     `json:"client_auth"`
}

// Where TLS ends, and what it leads to, unless the configuration says otherwise.
const (
	defaultListen  = 61443
	defaultForward = 8080
)

const (
	defaultDomain = "apps.internal"
	maxNames      = 64
	maxIndex      = 1<<31 - 1
	maxListeners  = 16
	maxALPN       = 16 // protocols of one listener
	maxResolvers  = 16 // and as many search domains and options
)

// settings are what the keys advertise, tls and dns say, without what only an ADD knows.
type settings struct {
	advertise *advertise
	tls       []endpoint.TLSListener
	dns       *resultDNS
}

// readSettings judges the keys advertise, tls and dns. bad is called for each problem.
func (c *config) readSettings(bad func(key, format string, args ...any)) {
	if !isNull(c.Advertise) {
		c.advertise = readAdvertise(c.Advertise, bad)
	}
	if !isNull(c.TLS) {
		c.tls = readTLS(c.TLS, bad)
	}
	if !isNull(c.DNS) {
		c.dns = readDNS(c.DNS, bad)
	}
}

// read reads an object all of whose members are known.
func read[T any](v []byte, member func(t *T, name string, v []byte) bool) (T, error) {
	var t T
	if plainjson.Each(v, func(name string, v []byte) bool { return member(&t, name, v) }) {
		return t, nil
	}
	t = *new(T)
	d := json.NewDecoder(bytes.NewReader(v))
	d.DisallowUnknownFields()
	return t, d.Decode(&t)
}

func (a *advertise) plain(name string, v []byte) bool {
	switch name {
	case "domain":
		return text(v, &a.Domain)
	case "names":
		return texts(v, &a.Names)
	case "group":
		return truth(v, &a.Group)
	case "port":
		return number(v, &a.Port)
	case "index":
		a.Index = v
		return true
	}
	return false
}

func (l *listener) plain(name string, v []byte) bool {
	switch name {
	case "listen":
		return number(v, &l.Listen)
	case "forward":
		return number(v, &l.Forward)
	case "alpn":
		return texts(v, &l.ALPN)
	case "client_auth":
		return truth(v, &l.ClientAuth)
	}
	return false
}

// readAdvertise judges what can be judged without CNI_ARGS.
func readAdvertise(v []byte, bad func(key, format string, args ...any)) *advertise {
	a, err := read(v, (*advertise).plain)
	if err != nil {
		bad("advertise", "%v: expected an object with domain, names, group, port and index", err)
		return &a
	}
	if a.Domain == "" {
		a.Domain = defaultDomain
	}
	if _, err := fullName(a.Domain, "", ""); err != nil {
		bad("advertise.domain", "%v, as in %s", err, defaultDomain)
	}
	if len(a.Names) == 0 && !a.Group {
		bad("advertise", `names nothing: expected names, or "group": true`)
	}
	if len(a.Names) > maxNames {
		bad("advertise.names", "has %d elements: expected at most %d", len(a.Names), maxNames)
	}
	if a.Port < 0 || a.Port > 65535 {
		bad("advertise.port", "is %d: expected 1 to 65535, or 0 for none", a.Port)
	}
	return &a
}

// fullName returns the name that is below domain, or complete with a final dot. template is what the name was made of: neither a final dot
// nor a wildcard comes from a variable, or who starts a container could take any name.
func fullName(s, domain, template string) (string, error) {
	if strings.Contains(s, "*") && !strings.Contains(template, "*") {
		return "", fmt.Errorf("name %.80q: a wildcard is not to come from a variable", s)
	}
	if !strings.HasSuffix(template, ".") && domain != "" {
		s += "." + domain
	}
	n, err := name.Parse(s)
	return string(n), err
}

// partOf judges the value of a variable of a template. Where that is made of several parts, a value with a dot would move them: with "${args.GROUP}.${args.JOB}"
// who calls his job a.web would be below web, which is another's.
func partOf(template, value string) error {
	alone := strings.HasPrefix(template, "${") && strings.IndexByte(template, '}') == len(template)-1
	if !alone && strings.Contains(value, ".") {
		return fmt.Errorf("is %.80q: expected no dot, since it is not the whole of the name", value)
	}
	return nil
}

// readTLS fills in what is not there.
func readTLS(v []byte, bad func(key, format string, args ...any)) []endpoint.TLSListener {
	var list []json.RawMessage
	if !plainjson.Elements(v, func(v []byte) bool { list = append(list, v); return true }) {
		bad("tls", "is no list: expected one of objects with listen, forward, alpn and client_auth, such as [{}]")
		return nil
	}
	if len(list) > maxListeners {
		bad("tls", "has %d elements: expected at most %d", len(list), maxListeners)
		return nil
	}
	var out []endpoint.TLSListener
	for i, v := range list {
		key := fmt.Sprintf("tls[%d]", i)
		l, err := read(v, (*listener).plain)
		if err != nil {
			bad(key, "%v: expected an object with listen, forward, alpn and client_auth", err)
			continue
		}
		for _, p := range []struct {
			name    string
			port    *int
			instead int
		}{{"listen", &l.Listen, defaultListen}, {"forward", &l.Forward, defaultForward}} {
			if *p.port == 0 {
				*p.port = p.instead
			}
			if *p.port < 1 || *p.port > 65535 {
				bad(key+"."+p.name, "is %d: expected 1 to 65535, or 0 for %d", *p.port, p.instead)
			}
		}
		judgeALPN(key, l.ALPN, bad)
		out = append(out, endpoint.TLSListener{Listen: uint16(l.Listen), Forward: uint16(l.Forward), ALPN: l.ALPN, ClientAuth: l.ClientAuth})
	}
	for i, l := range out {
		if slices.ContainsFunc(out[:i], func(m endpoint.TLSListener) bool { return m.Listen == l.Listen }) {
			bad(fmt.Sprintf("tls[%d].listen", i), "port %d is an earlier element's: expected one of its own", l.Listen)
		}
		if slices.ContainsFunc(out, func(m endpoint.TLSListener) bool { return m.Listen == l.Forward }) {
			bad(fmt.Sprintf("tls[%d].forward", i), "TLS ends at port %d: expected a port that takes what is clear", l.Forward)
		}
	}
	return out
}

// judgeALPN judges names of protocols (RFC 7301 section 3.1). Those in use are printable, and so are logs then.
func judgeALPN(key string, protocols []string, bad func(key, format string, args ...any)) {
	if len(protocols) > maxALPN {
		bad(key+".alpn", "has %d elements: expected at most %d", len(protocols), maxALPN)
		return
	}
	for i, p := range protocols {
		if len(p) < 1 || len(p) > 255 || strings.ContainsFunc(p, func(r rune) bool { return r <= ' ' || r > '~' }) {
			bad(fmt.Sprintf("%s.alpn[%d]", key, i), "is %.80q: expected 1 to 255 printable characters, such as h2", p)
		}
		if slices.Contains(protocols[:i], p) {
			bad(fmt.Sprintf("%s.alpn[%d]", key, i), "%.80q is there twice", p)
		}
	}
}

// readDNS returns what the result is to say of name resolution; nil for nothing. The key is the specification's: members that it may get are passed
// over.
func readDNS(v []byte, bad func(key, format string, args ...any)) *resultDNS {
	var d resultDNS
	if !plainjson.Each(v, d.plain) {
		d = resultDNS{}
		if err := json.Unmarshal(v, &d); err != nil {
			bad("dns", "%v: expected an object with nameservers, domain, search and options", err)
			return nil
		}
	}
	for i, s := range d.Nameservers {
		if _, err := netip.ParseAddr(s); err != nil {
			bad(fmt.Sprintf("dns.nameservers[%d]", i), "is %.80q: expected an IP address such as 169.254.0.2", s)
		}
	}
	for _, l := range []struct {
		key  string
		list []string
	}{{"nameservers", d.Nameservers}, {"search", d.Search}, {"options", d.Options}, {"domain", []string{d.Domain}}} {
		if len(l.list) > maxResolvers {
			bad("dns."+l.key, "has %d elements: expected at most %d", len(l.list), maxResolvers)
		}
		// Runtimes write these into resolv.conf, where white space begins the next one and a new line the next setting.
		for _, s := range l.list {
			if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) || s == "" && l.key != "domain" {
				bad("dns."+l.key, "%.80q: expected printable characters without white space", s)
			}
		}
	}
	if d.empty() {
		return nil
	}
	return &d
}

func (d *resultDNS) plain(name string, v []byte) bool {
	switch name {
	case "nameservers":
		return texts(v, &d.Nameservers)
	case "domain":
		return text(v, &d.Domain)
	case "search":
		return texts(v, &d.Search)
	case "options":
		return texts(v, &d.Options)
	}
	return !alike(name, "nameservers", "domain", "search", "options")
}

// advertisement returns by which names the container is to be found, nil for none.
func (c *call) advertisement(group string) (*endpoint.Advertisement, error) {
	a := c.cfg.advertise
	if a == nil {
		return nil, nil
	}
	out := &endpoint.Advertisement{Port: uint16(a.Port)}
	var errs []error
	add := func(key, name, template string) {
		full, err := fullName(name, a.Domain, template)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		case !slices.Contains(out.Names, full):
			out.Names = append(out.Names, full)
		}
	}
	for i, template := range a.Names {
		key := fmt.Sprintf("advertise.names[%d]", i)
		name, err := c.expand(key, template, func(value string) error { return partOf(template, value) })
		if err != nil {
			errs = append(errs, err)
			continue
		}
		add(key, name, template)
	}
	if a.Group {
		add("advertise.group: the policy group is to be a name", group, "")
	}
	var err error
	if out.Index, err = c.index(a.Index); err != nil {
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		return nil, &failure{code: codeConfig, msg: "invalid names", err: errors.Join(errs...)}
	}
	return out, nil
}

// index reads the number of the instance: nil for none.
func (c *call) index(v json.RawMessage) (*int, error) {
	if isNull(v) {
		return nil, nil
	}
	var value string
	if n, ok := plainjson.Int(v); ok {
		value = strconv.Itoa(n)
	} else if !text(v, &value) {
		if err := json.Unmarshal(v, &value); err != nil {
			return nil, fmt.Errorf("advertise.index: is %.80s: expected a number, or a template such as ${args.NOMAD_ALLOC_INDEX}", v)
		}
	}
	value, err := c.expand("advertise.index", value, nil)
	if err != nil {
		return nil, err
	}
	n, err := strconv.ParseUint(value, 10, 64)
	if err != nil || n > maxIndex {
		return nil, fmt.Errorf("advertise.index: is %.80q: expected 0 to %d", value, maxIndex)
	}
	i := int(n)
	return &i, nil
}
