package dns_test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/nats-io/nats.go"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// binary is the path of silk-dns.
var binary string

func TestMain(m *testing.M) {
	dir, remove, err := testkit.Programs("silk-dns")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	binary = filepath.Join(dir, "silk-dns")
	code := m.Run()
	remove()
	os.Exit(code)
}

// object is JSON.
type object map[string]any

// settings returns a configuration of our own on free ports, changed by more; a nil value leaves a key out.
func settings(t testing.TB, more ...object) object {
	t.Helper()
	o := object{
		"domains": []string{"apps.internal"}, "listen_dns": []string{"127.0.0.1:0"}, "state_dir": filepath.Join(t.TempDir(), "state"),
		"debug_server_port": 0, "resume_pruning_delay_seconds": 60, "warm_duration_seconds": 0, "log_level": "debug",
	}
	for _, m := range more {
		for k, v := range m {
			o[k] = v
			if v == nil {
				delete(o, k)
			}
		}
	}
	return o
}

// natsAt returns the key of a server.
func natsAt(n *testkit.NATS) object {
	return object{"nats": object{"hosts": []object{{"hostname": "127.0.0.1", "port": n.Port}}}}
}

// process is silk-dns in a process of its own.
type process struct {
	*testkit.Process
	DNS                              []string
	Lookup, Adapter, LogLevel, Debug string
}

// launch runs the program with a configuration and waits until it serves.
func launch(t testing.TB, cfg object) *process {
	t.Helper()
	return launchWith(t, cfg, nil, binary, "-config")
}

// launchWith runs a command line, to which the file is added, within what testkit.Launch calls so.
func launchWith(t testing.TB, cfg object, within func(func() error) error, line ...string) *process {
	t.Helper()
	return launchHolding(t, cfg, within, nil, line...)
}

// launchHolding is launchWith for a program that gets open files.
func launchHolding(t testing.TB, cfg object, within func(func() error) error, files []*os.File, line ...string) *process {
	t.Helper()
	b, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "dns.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(line[0], append(slices.Clone(line[1:]), file)...)
	cmd.ExtraFiles = files
	var serving struct {
		DNS, Lookup, Adapter, Debug string
		LogLevel                    string `json:"log_level"`
	}
	p := testkit.Launch(t, cmd, within, &serving)
	return &process{p, strings.Fields(strings.Trim(serving.DNS, "[]")), serving.Lookup, serving.Adapter, serving.LogLevel, serving.Debug}
}

// ask returns the addresses of a name, sorted, and the code of the answer.
func ask(ctx context.Context, server, name string) (string, error) {
	var c dns.Client
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), dns.TypeA)
	r, _, err := c.ExchangeContext(ctx, m, server)
	if err != nil {
		return "", err
	}
	var list []string
	for _, rr := range r.Answer {
		if a, ok := rr.(*dns.A); ok {
			list = append(list, a.A.String())
		}
	}
	slices.Sort(list)
	return strings.TrimSpace(dns.RcodeToString[r.Rcode] + " " + strings.Join(list, " ")), nil
}

// answers waits until a name has an answer: its code and addresses.
func (p *process) answers(t testing.TB, within time.Duration, name, want string) {
	t.Helper()
	testkit.Within(t, within, func() string {
		got, err := ask(t.Context(), p.DNS[0], name)
		if err != nil || got != want {
			return fmt.Sprintf("%s has answer %q, %v, want %q", name, got, err, want)
		}
		return ""
	})
}

// figure returns a metric of the program.
func (p *process) figure(t testing.TB, name string) string {
	t.Helper()
	_, body := get(t, http.DefaultClient, "http://"+cmp.Or(p.Debug, p.LogLevel)+"/metrics")
	for line := range strings.Lines(body) {
		if v, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// counts waits until a metric has a value.
func (p *process) counts(t testing.TB, name, want string) {
	t.Helper()
	testkit.Within(t, 30*time.Second, func() string {
		if got := p.figure(t, name); got != want {
			return fmt.Sprintf("%s is %s, want %s", name, got, want)
		}
		return ""
	})
}

func get(t testing.TB, c *http.Client, url string) (int, string) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// emitter speaks on NATS as the deployed route emitter does.
type emitter struct{ *nats.Conn }

func emit(t testing.TB, n *testkit.NATS, o ...nats.Option) emitter {
	t.Helper()
	c, err := nats.Connect("nats://"+n.Address(), append([]nats.Option{nats.MaxReconnects(-1), nats.ReconnectWait(50 * time.Millisecond), nats.RetryOnFailedConnect(true)}, o...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return emitter{c}
}

// payload is what an emitter says of an instance.
func payload(address, name string, index int) []byte {
	b, err := json.Marshal(object{
		"host": address, "uris": []string{name, fmt.Sprintf("%d.%s", index, name)}, "app": "7a7a", "tags": object{"component": "route-emitter"},
		"private_instance_id": "e6e6", "private_instance_index": fmt.Sprint(index), "availability_zone": "z1",
	})
	if err != nil {
		panic(err)
	}
	return b
}

func (e emitter) say(t testing.TB, subject string, b []byte) {
	t.Helper()
	if err := e.Publish("service-discovery."+subject, b); err != nil {
		t.Fatal(err)
	}
}

func (e emitter) register(t testing.TB, address, name string, index int) {
	t.Helper()
	e.say(t, "register", payload(address, name, index))
}

// free returns a port of the loopback interface.
func free(t testing.TB) int {
	t.Helper()
	port, err := testkit.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// address returns the n-th address of the default range.
func address(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, 255, byte(n >> 8), byte(n)}) }

// natsUser lets an emitter say who it is.
func natsUser(user, password string) nats.Option { return nats.UserInfo(user, password) }
