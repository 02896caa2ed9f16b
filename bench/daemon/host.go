package daemon

import (
	"context"
	"crypto/tls"
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
	"sync"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"code.cloudfoundry.org/silk/lease/leasesql"
)

const underlay = "192.0.2.1"

// Options say what a Host is to be like.
type Options struct {
	Dir      string // for all of its files; made
	Program  string // silk-daemon
	Overlay  string // network in CIDR notation
	Bits     int    // prefix length of a lease
	Interval int    // seconds between renewals
}

// Host is a namespace with a loopback device as underlay, the lease API over SQLite in this process, and silk-daemon as one of its own.
type Host struct {
	Options
	NS      *kernel.NS
	log     string // file
	store   *leasesql.Store
	server  *http.Server
	end     func()
	process *os.Process
	wg      sync.WaitGroup
}

// NewHost makes a host, on which the daemon is still to be started.
func NewHost(ctx context.Context, o Options) (h *Host, err error) {
	h = &Host{Options: o, log: filepath.Join(o.Dir, "log"), end: func() {}}
	dir := o.Dir
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if h.NS, err = kernel.NewNS(); err != nil {
		return nil, err
	}
	if err := h.underlay(); err != nil {
		return nil, err
	}
	ca, err := pki.OpenCA(filepath.Join(dir, "pki"))
	if err != nil {
		return nil, err
	}
	cert, key, err := ca.Issue("bench", netip.MustParseAddr(underlay))
	if err != nil {
		return nil, err
	}
	if err := h.config(cert, key, ca.CertFile()); err != nil {
		return nil, err
	}
	tc, err := service.Certificates{CA: ca.CertFile(), Cert: cert, Key: key}.Server()
	if err != nil {
		return nil, err
	}
	return h, h.serve(ctx, tc)
}

// underlay gives the loopback device an address that is not a loopback address.
func (h *Host) underlay() error {
	c, err := kernel.Dial(h.NS)
	if err != nil {
		return err
	}
	defer c.Close()
	const lo = 1
	var b kernel.Batch
	b.Add(syscall.RTM_NEWLINK, 0, kernel.IfInfo(lo, syscall.IFF_UP, syscall.IFF_UP))
	b.Add(syscall.RTM_NEWADDR, syscall.NLM_F_CREATE, kernel.IfAddr(lo, 24, 0))
	a := netip.MustParseAddr(underlay).AsSlice()
	b.Attr(syscall.IFA_LOCAL, a)
	b.Attr(syscall.IFA_ADDRESS, a)
	refused, err := c.Do(&b)
	for _, r := range refused {
		err = errors.Join(err, r)
	}
	return err
}

// serve starts the lease API.
func (h *Host) serve(ctx context.Context, tc *tls.Config) error {
	pool, err := lease.NewPool(netip.MustParsePrefix(h.Overlay), h.Bits)
	if err != nil {
		return err
	}
	log := slog.New(slog.DiscardHandler)
	h.store, err = leasesql.Open(ctx, leasesql.Config{DB: sqldb.Config{Type: "sqlite", Path: filepath.Join(h.Dir, "db")}, Pool: pool, Expiration: time.Hour}, log)
	if err != nil {
		return err
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	h.end = cancel
	h.wg.Go(func() { h.store.Run(run) })
	var ln net.Listener
	if err := h.NS.Do(func() error { ln, err = net.Listen("tcp", underlay+":4103"); return err }); err != nil {
		return err
	}
	h.server = &http.Server{Handler: leasehttp.Handler(h.store, log, leasehttp.HandlerOptions{}), ErrorLog: slog.NewLogLogger(log.Handler(), 0)}
	h.wg.Go(func() { h.server.Serve(tls.NewListener(ln, tc)) })
	return nil
}

// fill gives n other hosts a lease each.
func (h *Host) fill(ctx context.Context, n int) error {
	var all sync.WaitGroup
	errs := make([]error, n)
	next := make(chan int)
	for range 64 {
		all.Go(func() {
			for i := range next {
				_, errs[i] = h.store.Acquire(ctx, netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), lease.Block)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	all.Wait()
	return errors.Join(errs...)
}

// Start starts the daemon.
func (h *Host) Start(ctx context.Context) error {
	f, err := os.OpenFile(h.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := exec.CommandContext(ctx, h.Program, "-config", filepath.Join(h.Dir, "config.json"))
	cmd.Stdout, cmd.Stderr = f, f
	if err := h.NS.Do(cmd.Start); err != nil {
		return fmt.Errorf("start silk-daemon: %w", err)
	}
	h.process = cmd.Process
	h.wg.Go(func() { cmd.Wait() })
	return nil
}

// stop ends the daemon; Close waits for it.
func (h *Host) stop() {
	if h.process != nil {
		h.process.Kill()
		h.process = nil
	}
}

// EndpointDir returns the directory of the records.
func (h *Host) EndpointDir() string { return filepath.Join(h.Dir, "endpoints") }

// Close ends everything and waits for it.
func (h *Host) Close() {
	h.stop()
	if h.server != nil {
		h.server.Close()
	}
	h.end()
	h.wg.Wait()
	if h.store != nil {
		h.store.Close()
	}
	if h.NS != nil {
		h.NS.Close()
	}
}

func copyTo(w io.Writer, resp *http.Response) (int64, error) {
	defer resp.Body.Close()
	return io.Copy(w, resp.Body)
}
