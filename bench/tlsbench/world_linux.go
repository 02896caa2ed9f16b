package tlsbench

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/kernel/tcp"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/tlsproxy"
)

const (
	silkPort    = 61443
	haproxyPort = 61444
	debugPort   = 8057
	patience    = 20 * time.Second
)

// world is a host with two containers, and both proxies before the application of one.
type world struct {
	dir                   string
	host, client, server  *kernel.NS
	from, to              netip.Addr
	roots                 *x509.CertPool
	silk, haproxy, answer *proxy
}

// proxy is a process under measurement.
type proxy struct {
	name   string
	port   uint16
	cmd    *exec.Cmd
	settle func() error // makes it give up what it does not need
}

func newWorld(ctx context.Context) (w *world, err error) {
	w = &world{}
	haproxy, err := needHaproxy()
	if err != nil {
		return nil, err
	}
	if w.dir, err = os.MkdirTemp("", "silk-bench-tls-"); err != nil {
		return nil, err
	}
	for _, ns := range []**kernel.NS{&w.host, &w.client, &w.server} {
		if *ns, err = kernel.NewNS(); err != nil {
			return w, err
		}
		if err := shell(*ns, "ip link set lo up; sysctl -qw net.ipv4.ip_forward=1 net.ipv4.ip_local_port_range='1024 65000' net.ipv4.tcp_max_tw_buckets=0"); err != nil {
			return w, err
		}
	}
	records, err := endpoint.Open(filepath.Join(w.dir, "endpoints"))
	if err != nil {
		return w, err
	}
	if w.from, err = w.attach(ctx, records, "client", w.client); err != nil {
		return w, err
	}
	if w.to, err = w.attach(ctx, records, "server", w.server, endpoint.TLSListener{Listen: silkPort, Forward: 8080}); err != nil {
		return w, err
	}
	if err := w.certificate(); err != nil {
		return w, err
	}
	if w.answer, err = w.child(w.server, "application", netip.AddrPortFrom(netip.IPv4Unspecified(), 8080).String()); err != nil {
		return w, err
	}
	if err := w.startSilk(); err != nil {
		return w, err
	}
	if err := w.startHaproxy(haproxy); err != nil {
		return w, err
	}
	return w, w.ready(ctx)
}

func (w *world) attach(ctx context.Context, records *endpoint.Dir, name string, ns *kernel.NS, ports ...endpoint.TLSListener) (netip.Addr, error) {
	var a netip.Addr
	err := w.host.Do(func() error {
		r, err := records.Attach(ctx, endpoint.Spec{
			Key: endpoint.Key{Network: "silk", Container: name, Interface: "eth0"}, Path: path(ns), Namespace: ns, Subnet: netip.MustParsePrefix("10.255.30.0/24"),
			MTU: 1450, Group: name, TLS: ports,
		}, nil)
		a = r.Address()
		return err
	})
	return a, err
}

func path(ns *kernel.NS) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()) }

func shell(ns *kernel.NS, command string) error {
	return ns.Do(func() error {
		if out, err := exec.Command("sh", "-ec", command).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", command, err, out)
		}
		return nil
	})
}

// certificate makes one for both proxies, in the form that each wants.
func (w *world) certificate() error {
	ca, err := pki.OpenCA(filepath.Join(w.dir, "ca"))
	if err != nil {
		return err
	}
	cert, key, err := ca.Issue("server", w.to)
	if err != nil {
		return err
	}
	c, err1 := os.ReadFile(cert)
	k, err2 := os.ReadFile(key)
	root, err3 := os.ReadFile(ca.CertFile())
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	w.roots = x509.NewCertPool()
	w.roots.AppendCertsFromPEM(root)
	dir := filepath.Join(w.dir, "certificates", "server")
	return errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, "instance.crt"), c, 0o600), os.WriteFile(filepath.Join(dir, "instance.key"), k, 0o600),
		os.WriteFile(filepath.Join(w.dir, "haproxy.pem"), slices.Concat(c, k), 0o600))
}

// start runs a process in a namespace. It ends with this one.
func (w *world) start(ns *kernel.NS, name string, env []string, args ...string) (*proxy, error) {
	cmd := exec.Command("nsenter", append([]string{"--net=" + path(ns), "--"}, args...)...)
	cmd.Env, cmd.Stderr = append(os.Environ(), env...), os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // whose end would be the child's
		started <- cmd.Start()
		cmd.Wait()
	}()
	return &proxy{name: name, cmd: cmd, settle: func() error { return nil }}, <-started
}

// child runs this program as a part of the measurement.
func (w *world) child(ns *kernel.NS, role, what string) (*proxy, error) {
	return w.start(ns, role, []string{childVariable + "=" + role + " " + what}, os.Args[0])
}

func (w *world) startSilk() error {
	c := tlsproxy.DefaultConfig()
	c.EndpointDir, c.Certificates, c.CertificateDirectory, c.PolicyAgent, c.LogLevel = filepath.Join(w.dir, "endpoints"), tlsproxy.FromDirectory, w.dir+"/certificates/{container}", "", "error"
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	config := filepath.Join(w.dir, "tls.json")
	if err := os.WriteFile(config, b, 0o600); err != nil {
		return err
	}
	w.silk, err = w.start(w.host, "silk-tls", []string{childVariable + "=proxy " + config}, os.Args[0])
	w.silk.port, w.silk.settle = silkPort, w.collect
	return err
}

// silk is silk-tls.
func silk(config string) error {
	ctx, stop := service.Signals()
	defer stop()
	cfg, _, err := tlsproxy.Load(config)
	if err != nil {
		return err
	}
	level := new(slog.LevelVar)
	return tlsproxy.Run(ctx, cfg, level, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})))
}

// collect has silk-tls collect its garbage: what is left is what connections take. haproxy frees what it does not use by itself.
func (w *world) collect() error {
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return tcp.Dial(ctx, w.host, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), debugPort))
	}}}
	for range 3 { // stacks shrink by half each time
		resp, err := client.Get("http://silk-tls/debug/pprof/heap?gc=1")
		if err != nil {
			return err
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	return nil
}

// startHaproxy runs the baseline inside the container, where silk-tls has its sockets.
func (w *world) startHaproxy(bin string) error {
	config := filepath.Join(w.dir, "haproxy.cfg")
	text := fmt.Sprintf(`global
  nbthread %d
  maxconn %d
  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-bind-ciphers ECDHE-ECDSA-AES128-GCM-SHA256
  ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
  mode tcp
  timeout connect 250ms
  timeout client 1h
  timeout server 1h
listen c2c
  bind %[3]v:%[4]d ssl crt %[5]s/haproxy.pem
  server app %[3]v:8080
`, runtime.NumCPU(), descriptors()/2-100, w.to, haproxyPort, w.dir)
	err := os.WriteFile(config, []byte(text), 0o600)
	if err == nil {
		w.haproxy, err = w.start(w.server, "haproxy", nil, bin, "-db", "-q", "-f", config)
		w.haproxy.port = haproxyPort
	}
	return err
}

// descriptors returns how many files a process may have open here.
func descriptors() int {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 1024
	}
	return int(min(l.Max, 1<<20))
}

// ready waits until both proxies reach the application.
func (w *world) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, p := range []*proxy{w.silk, w.haproxy} {
		for {
			c, err := w.secure(ctx, p, tls.VersionTLS13, tls.X25519)
			if err == nil {
				_, err = c.Write([]byte{'e'})
				if err == nil {
					_, err = c.Read(make([]byte, 1))
				}
				c.Close()
			}
			if err == nil {
				break
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return fmt.Errorf("%s does not answer: %w", p.name, err)
			}
		}
	}
	return nil
}

func (w *world) close() {
	for _, p := range []*proxy{w.silk, w.haproxy, w.answer} {
		if p != nil && p.cmd.Process != nil {
			p.cmd.Process.Kill()
		}
	}
	for _, ns := range []*kernel.NS{w.host, w.client, w.server} {
		if ns != nil {
			ns.Close()
		}
	}
	os.RemoveAll(w.dir)
}

// secure connects from the client's container.
func (w *world) secure(ctx context.Context, p *proxy, version uint16, curve tls.CurveID) (*tls.Conn, error) {
	raw, err := tcp.Dial(ctx, w.client, netip.AddrPortFrom(w.to, p.port))
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, &tls.Config{
		RootCAs: w.roots, ServerName: w.to.String(), MinVersion: version, MaxVersion: version, CurvePreferences: []tls.CurveID{curve},
		CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256},
	})
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// breakOff ends a connection without leaving anything in the kernel.
func breakOff(c *tls.Conn) {
	c.NetConn().(*net.TCPConn).SetLinger(0)
	c.NetConn().Close()
}

// cpu returns what the process has computed.
func (p *proxy) cpu() (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), ") ") // a name may have spaces in it
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, errors.New("no times in /proc/PID/stat")
	}
	user, err1 := strconv.Atoi(f[11])
	system, err2 := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2) // USER_HZ is 100 everywhere
}

// resident returns the process's memory in bytes.
func (p *proxy) resident() (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	var size, resident int64
	_, err = fmt.Sscan(string(b), &size, &resident)
	return resident * int64(os.Getpagesize()), err
}

// application does what the first byte of a connection says: send without end, take without end, or send each byte back.
func application(address string) error {
	l, err := net.Listen("tcp4", address)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			var what [1]byte
			if _, err := io.ReadFull(c, what[:]); err != nil {
				return
			}
			b := make([]byte, 1)
			if what[0] != 'e' {
				b = make([]byte, 256<<10)
			}
			for n := copy(b, what[:]); ; {
				switch what[0] {
				case 'd':
					_, err = c.Write(b)
				case 'u':
					_, err = c.Read(b)
				default:
					if _, err = c.Write(b[:n]); err == nil {
						_, err = c.Read(b)
					}
				}
				if err != nil {
					return
				}
			}
		}()
	}
}
