package dns_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/registration/registrationhttp"
)

// certs are what a controller and an adapter have.
type certs struct {
	ca                                           string
	serverCert, serverKey, clientCert, clientKey string
	client                                       *tls.Config
}

func issue(t testing.TB) certs {
	t.Helper()
	ca, err := pki.OpenCA(filepath.Join(t.TempDir(), "pki"))
	if err != nil {
		t.Fatal(err)
	}
	c := certs{ca: ca.CertFile()}
	var err1, err2 error
	c.serverCert, c.serverKey, err1 = ca.Issue("server", netip.MustParseAddr("127.0.0.1"))
	c.clientCert, c.clientKey, err2 = ca.Issue("client")
	pair, err3 := tls.LoadX509KeyPair(c.clientCert, c.clientKey)
	b, err4 := os.ReadFile(c.ca)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(b)
	c.client = &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}}
	return c
}

func (c certs) server() object {
	return object{"server_cert": c.serverCert, "server_key": c.serverKey, "ca_cert": c.ca}
}

// asDeployed starts the program with a file of a deployed one as its supervisor does, with /var/lib as on a machine that has nothing of ours.
func asDeployed(t testing.TB, cfg object) *process {
	t.Helper()
	if os.Getuid() != 0 {
		testkit.Require(t, "root", errors.New("not run by root"))
	}
	return launchWith(t, cfg, nil, "unshare", "-m", "sh", "-c", `mount -t tmpfs none /var/lib && exec "$0" "$@"`, binary, "-c")
}

func post(t testing.TB, url, body string) int {
	t.Helper()
	resp, err := http.Post(url, "text/plain", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if b, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode == 204 && len(b) > 0 || !resp.Close {
		t.Errorf("%s: body %q, %v, close %v: want no keep-alive", url, b, err, resp.Close)
	}
	return resp.StatusCode
}

// TestDeployedFilesRun: a controller and an adapter with the files that the deployed release renders, of which only addresses, ports and paths of certificates
// are this machine's.
func TestDeployedFilesRun(t *testing.T) {
	n, c := testkit.StartNATS(t, testkit.NATSOptions{User: "nats", Password: "nats-password"}), issue(t)
	port := free(t)
	file := deployed(t, "service-discovery-controller").with(c.server()).with(object{"port": strconv.Itoa(port), "log_level_port": free(t), "warm_duration_seconds": 4})
	file["nats"].(map[string]any)["hosts"] = []object{{"hostname": "127.0.0.1", "port": n.Port}}
	controller := asDeployed(t, file)
	if controller.Debug != "" || len(controller.DNS) > 0 || controller.Adapter != "" {
		t.Errorf("a controller serves more than that: %+v", controller)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: c.client}}
	base := fmt.Sprintf("https://127.0.0.1:%d", port)
	if status, body := get(t, client, base+"/v1/registration/api.apps.internal"); status != 500 || body != "address table is not warm\n" {
		t.Errorf("cold: %d %q", status, body)
	}
	controller.counts(t, "silk_dns_nats_connected", "1")
	e := emit(t, n, natsUser("nats", "nats-password"))
	e.register(t, "10.255.1.1", "api.apps.internal", 0)
	e.register(t, "192.168.7.7", "api.apps.internal", 1)
	e.register(t, "8.8.8.8", "api.apps.internal", 2)
	const hosts = `{"hosts":[{"ip_address":"10.255.1.1","last_check_in":"","port":0,"revision":"","service":"","service_repo_name":"","tags":{}},` +
		`{"ip_address":"192.168.7.7","last_check_in":"","port":0,"revision":"","service":"","service_repo_name":"","tags":{}}],"env":"","service":""}`
	testkit.Within(t, soon, func() string {
		if status, body := get(t, client, base+"/v1/registration/API.apps.internal."); status != 200 || body != hosts {
			return fmt.Sprintf("%d %s", status, body)
		}
		return ""
	})
	client.CloseIdleConnections()

	adapter := asDeployed(t, deployed(t, "bosh-dns-adapter").with(object{
		"port": strconv.Itoa(free(t)), "log_level_port": free(t), "service_discovery_controller_address": "127.0.0.1", "service_discovery_controller_port": strconv.Itoa(port),
		"client_cert": c.clientCert, "client_key": c.clientKey, "ca_cert": c.ca,
	}))
	status, body := get(t, http.DefaultClient, "http://"+adapter.Adapter+"/?name=0.api.apps.internal.&type=1")
	if want := `{"Status":0,"TC":false,"RD":false,"RA":false,"AD":false,"CD":false,"Question":[{"name":"0.api.apps.internal.","type":1}],"Answer":[` +
		`{"name":"0.api.apps.internal.","type":1,"TTL":0,"data":"10.255.1.1"}],"Additional":[],"edns_client_subnet":"0.0.0.0/0"}`; status != 200 || body != want {
		t.Errorf("adapter: %d %s", status, body)
	}
	if status, _ := get(t, http.DefaultClient, "http://"+adapter.Adapter+"/health"); status != 200 {
		t.Errorf("health: %d", status)
	}
	for _, p := range []*process{controller, adapter} {
		for body, want := range map[string]int{"debug": 204, "info": 204, "warn": 400, "DEBUG": 400, "": 400, "info\n": 400} {
			if got := post(t, "http://"+p.LogLevel+"/log-level", body); got != want {
				t.Errorf("log level %q: %d, want %d", body, got, want)
			}
		}
		if status, _ := get(t, http.DefaultClient, "http://"+p.LogLevel+"/"); status != 404 {
			t.Errorf("log-level root: %d, want 404", status)
		}
		if status, body := get(t, http.DefaultClient, "http://"+p.LogLevel+"/metrics"); status != 200 || !strings.Contains(body, "silk_dns_healthy 1") {
			t.Errorf("metrics: %d\n%s", status, body)
		}
		p.End(t)
	}
}

func TestLookupAPIKeepsOthersOut(t *testing.T) {
	c := issue(t)
	p := launch(t, settings(t, c.server(), object{"address": "127.0.0.1", "port": "0"}))
	conn, err := net.Dial("tcp", p.Lookup)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Write([]byte("GET /routes HTTP/1.1\r\nHost: x\r\n\r\n"))
	if b, err := io.ReadAll(conn); err != nil || !bytes.HasPrefix(b, []byte("HTTP/1.0 400 Bad Request\r\n")) {
		t.Errorf("a request in clear: %q, %v", b, err)
	}
	bare := c.client.Clone()
	bare.Certificates = nil
	if _, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: bare}}).Get("https://" + p.Lookup + "/routes"); err == nil {
		t.Error("a caller without a certificate was answered")
	}
	old := c.client.Clone()
	old.MaxVersion = tls.VersionTLS11
	if _, err := tls.Dial("tcp", p.Lookup, old); err == nil {
		t.Error("TLS 1.1 was spoken")
	}
	for version, suite := range map[uint16]uint16{tls.VersionTLS12: tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.VersionTLS13: 0} {
		tc := c.client.Clone()
		tc.MaxVersion = version
		conn, err := tls.Dial("tcp", p.Lookup, tc)
		if err != nil {
			t.Errorf("version %x: %v", version, err)
			continue
		}
		if s := conn.ConnectionState(); s.Version != version || suite != 0 && s.CipherSuite != suite && s.CipherSuite != tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 {
			t.Errorf("version %x suite %x", s.Version, s.CipherSuite)
		}
		conn.Close()
	}
	weak := c.client.Clone()
	weak.MaxVersion, weak.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}
	if _, err := tls.Dial("tcp", p.Lookup, weak); err == nil {
		t.Error("a suite was spoken that the profile has not")
	}
}

// TestAdapterBeforeTheOwnTable: both APIs and DNS of one process.
func TestAdapterBeforeTheOwnTable(t *testing.T) {
	n := testkit.StartNATS(t, testkit.NATSOptions{})
	p := launch(t, settings(t, natsAt(n), object{"adapter_address": "127.0.0.1", "adapter_port": "0"}))
	p.counts(t, "silk_dns_nats_connected", "1")
	emit(t, n).register(t, "10.255.1.1", "api.apps.internal", 0)
	p.answers(t, soon, "api.apps.internal", "NOERROR 10.255.1.1")
	if status, body := get(t, http.DefaultClient, "http://"+p.Adapter+"/?name=api.apps.internal"); status != 200 || !strings.Contains(body, `"data":"10.255.1.1"`) {
		t.Errorf("adapter: %d %s", status, body)
	}
	status, body := get(t, http.DefaultClient, "http://"+p.Debug+"/v1/names?address=10.255.1.1")
	var names struct{ Names map[string][]string }
	if err := json.Unmarshal([]byte(body), &names); status != 200 || err != nil || fmt.Sprint(names.Names) != "map[10.255.1.1:[0.api.apps.internal api.apps.internal]]" {
		t.Errorf("names: %d %s", status, body)
	}
	debug, err := netip.ParseAddrPort(p.Debug)
	if err != nil {
		t.Fatal(err)
	}
	client, at := registrationhttp.NewLocalNames(debug.Port(), soon), netip.MustParseAddr("10.255.1.1")
	defer client.Close()
	if names, _, err := client.Of(t.Context(), []netip.Addr{at}); err != nil || fmt.Sprint(names[at]) != "[0.api.apps.internal api.apps.internal]" {
		t.Errorf("names at the local socket: %v, %v", names, err)
	}
	if status, body := get(t, http.DefaultClient, "http://"+p.Debug+"/health"); status != 200 || !strings.Contains(body, `"ready"`) {
		t.Errorf("health: %d %s", status, body)
	}
}

// TestExitCodes: 2 for what is wrong with the file, as of the deployed programs, 1 for what is wrong with the machine.
func TestExitCodes(t *testing.T) {
	c := issue(t)
	sdc := deployed(t, "service-discovery-controller").with(c.server()).with(object{"log_level_port": 0, "nats": nil, "state_dir": t.TempDir(), "port": "0"})
	adapter := deployed(t, "bosh-dns-adapter").with(object{"client_cert": c.clientCert, "client_key": c.clientKey, "ca_cert": c.ca, "log_level_port": free(t), "port": "0"})
	tlsOn := object{"nats": object{"tls_enabled": true, "ca_certs": "/nonexistent", "hosts": []object{{"hostname": "127.0.0.1", "port": 1}}}}
	for name, test := range map[string]struct {
		text string
		want int
		says string
	}{
		"no file":                {"", 2, "read config"},
		"no JSON":                {"{", 2, "unmarshal config"},
		"a number as port":       {`{"port":8054}`, 2, "port"},
		"nats without its files": {encode(t, sdc.with(tlsOn)), 2, "error reading NATS CA certs"},
		"unknown key of ours":    {`{"domains":["a"],"listen_dsn":[]}`, 2, "listen_dns"},
		"forward to itself":      {encode(t, settings(t, object{"listen_dns": []string{"127.0.0.1:5353"}, "forward": []string{"127.0.0.1:5353"}})), 2, "forward[0]"},
		"too long a domain":      {encode(t, settings(t, object{"domains": []string{strings.Repeat("a.", 121) + "a"}})), 2, "domains[0]"},
		"a port in a hostname":   {encode(t, sdc.with(object{"nats": object{"hosts": []object{{"hostname": "127.0.0.1:1", "port": 1}}}})), 2, "nats.hosts[0].hostname"},
		"address":                {encode(t, adapter.with(object{"address": "192.0.2.1"})), 1, "Address (192.0.2.1) not available"},
		"controller's address":   {encode(t, sdc.with(object{"address": "192.0.2.1"})), 1, "Address (192.0.2.1) not available"},
		"adapter's certificate":  {encode(t, adapter.with(object{"client_cert": "/nonexistent"})), 1, "/nonexistent"},
		"server's certificate":   {encode(t, sdc.with(object{"server_key": "/nonexistent"})), 1, "/nonexistent"},
	} {
		file := filepath.Join(t.TempDir(), "config.json")
		if test.text != "" {
			if err := os.WriteFile(file, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		out, err := exec.Command(binary, "-c", file).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != test.want || !strings.Contains(string(out), test.says) {
			t.Errorf("%s: %v, want exit code %d and %q\n%s", name, err, test.want, test.says, out)
		}
	}
}

func encode(t testing.TB, o object) string {
	t.Helper()
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestSlowHeadersEnd: read_header_timeout.
func TestSlowHeadersEnd(t *testing.T) {
	c := issue(t)
	p := launch(t, settings(t, c.server(), object{"address": "127.0.0.1", "port": "0", "read_header_timeout": "300ms"}))
	conn, err := tls.Dial("tcp", p.Lookup, c.client)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Write([]byte("GET /routes HTTP/1.1\r\n"))
	conn.SetReadDeadline(time.Now().Add(soon))
	if _, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("half a header keeps a connection")
	}
}
