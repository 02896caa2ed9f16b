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

const (
	underlay = "192.0.2.1"
	network  = "100.64.0.0/10"
)

// host is a namespace with a loopback device as underlay, the lease API over SQLite, and the daemon.
type host struct {
	ns      *kernel.NS
	dir     string
	program string
	log     string // file
	store   *leasesql.Store
	server  *http.Server
	end     func()
	process *os.Process
	wg      sync.WaitGroup
}

func newHost(ctx context.Context, dir, program string) (h *host, err error) {
	h = &host{dir: dir, program: program, log: filepath.Join(dir, "log"), end: func() {}}
	defer func() {
		if err != nil {
			h.close()
		}
	}()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if h.ns, err = kernel.NewNS(); err != nil {
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
func (h *host) underlay() error {
	c, err := kernel.Dial(h.ns)
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
func (h *host) serve(ctx context.Context, tc *tls.Config) error {
	pool, err := lease.NewPool(netip.MustParsePrefix(network), 24)
	if err != nil {
		return err
	}
	log := slog.New(slog.DiscardHandler)
	h.store, err = leasesql.Open(ctx, leasesql.Config{DB: sqldb.Config{Type: "sqlite", Path: filepath.Join(h.dir, "db")}, Pool: pool, Expiration: time.Hour}, log)
	if err != nil {
		return err
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	h.end = cancel
	h.wg.Go(func() { h.store.Run(run) })
	var ln net.Listener
	if err := h.ns.Do(func() error { ln, err = net.Listen("tcp", underlay+":4103"); return err }); err != nil {
		return err
	}
	h.server = &http.Server{Handler: leasehttp.Handler(h.store, log, leasehttp.HandlerOptions{}), ErrorLog: slog.NewLogLogger(log.Handler(), 0)}
	h.wg.Go(func() { h.server.Serve(tls.NewListener(ln, tc)) })
	return nil
}

// fill gives n other hosts a lease each.
func (h *host) fill(ctx context.Context, n int) error {
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

// start starts the daemon.
func (h *host) start(ctx context.Context) error {
	f, err := os.OpenFile(h.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd := exec.CommandContext(ctx, h.program, "-config", filepath.Join(h.dir, "config.json"))
	cmd.Stdout, cmd.Stderr = f, f
	if err := h.ns.Do(cmd.Start); err != nil {
		return fmt.Errorf("start silk-daemon: %w", err)
	}
	h.process = cmd.Process
	h.wg.Go(func() { cmd.Wait() })
	return nil
}

// stop ends the daemon; close waits for it.
func (h *host) stop() {
	if h.process != nil {
		h.process.Kill()
		h.process = nil
	}
}

func (h *host) close() {
	h.stop()
	if h.server != nil {
		h.server.Close()
	}
	h.end()
	h.wg.Wait()
	if h.store != nil {
		h.store.Close()
	}
	if h.ns != nil {
		h.ns.Close()
	}
}

func copyTo(w io.Writer, resp *http.Response) (int64, error) {
	defer resp.Body.Close()
	return io.Copy(w, resp.Body)
}
