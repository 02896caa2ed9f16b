package controller

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/authority/authorityhttp"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/internal/metrics"
	"code.cloudfoundry.org/silk/lease/leasesql"
	"code.cloudfoundry.org/silk/registration"
)

const (
	rootEvery   = 2 * time.Second // between two looks at the files of the container CA
	maxRootFile = 1 << 20         // in bytes
)

// ContainerCA are the keys of the authority from which hosts get what they sign their containers' certificates with. Without the two files there is none.
type ContainerCA struct {
	CertFile    string   `json:"container_ca_cert_file"` // roots in PEM form, the issuing one first
	KeyFile     string   `json:"container_ca_key_file"`  // of the first root
	Domains     []string `json:"container_ca_domains"`
	TrustDomain string   `json:"container_ca_trust_domain"`
	Seconds     int      `json:"container_ca_intermediate_seconds"`
}

func (c *ContainerCA) validate(p *config.Problems) {
	p.Require("container_ca_cert_file", c.CertFile != "" || c.KeyFile == "", "the roots in PEM form, beside container_ca_key_file")
	p.Require("container_ca_key_file", c.KeyFile != "" || c.CertFile == "", "the key of the first root, beside container_ca_cert_file")
	if n := time.Duration(c.Seconds) * time.Second; c.Seconds < 0 || c.Seconds > maxSeconds || n < authority.MinIntermediate || n > authority.MaxIntermediate {
		p.Addf("container_ca_intermediate_seconds", "%d: expected %d to %d", c.Seconds, authority.MinIntermediate/time.Second, authority.MaxIntermediate/time.Second)
	}
	if len(c.Domains) == 0 || len(c.Domains) > 64 {
		p.Addf("container_ca_domains", "%d domains: expected 1 to 64, such as apps.internal", len(c.Domains))
	}
	for i, d := range c.Domains {
		n, err := registration.ParseName(d)
		if err == nil && strings.HasPrefix(d, "*") {
			err = fault.Invalidf("domain %q: expected one without a wildcard: what is below it is permitted as well", d)
		}
		p.Check(fmt.Sprintf("container_ca_domains[%d]", i), err)
		c.Domains[i] = string(n)
	}
	t, err := authority.ParseTrustDomain(c.TrustDomain)
	p.Check("container_ca_trust_domain", err)
	c.TrustDomain = string(t)
}

// containerCA is the root that issues, which follows its files.
type containerCA struct {
	cfg     ContainerCA
	clients string       // file of the authorities of our clients
	network netip.Prefix // of all leases
	log     *slog.Logger
	root    atomic.Pointer[authority.Root] // the last good one; nil: there was none yet

	tried   []byte // what the files held when they were last tried; of look only
	failing bool   // of look only

	up, expires, roots prometheus.Gauge
	asked              *prometheus.CounterVec
}

func newContainerCA(cfg Config, log *slog.Logger, reg prometheus.Registerer) *containerCA {
	c := &containerCA{cfg: cfg.ContainerCA, clients: cfg.CACertFile, network: cfg.Network, log: log}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: prefix + "container_ca_" + name, Help: help})
	}
	c.up = gauge("up", "Whether the files of the container CA can be used as they are now.")
	c.expires = gauge("root_expiry_timestamp_seconds", "When the root that issues ends, in seconds since 1970; 0 without one.")
	c.roots = gauge("roots", "Roots that are trusted.")
	c.asked = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: prefix + "container_ca_intermediates_total", Help: "Requests of hosts for an intermediate, by outcome: issued, or why not.",
	}, []string{"outcome"})
	for _, o := range []authorityhttp.Outcome{
		authorityhttp.Issued, authorityhttp.Foreign, authorityhttp.NoLease, authorityhttp.Malformed, authorityhttp.TooOften, authorityhttp.Unavailable,
	} {
		c.asked.WithLabelValues(string(o))
	}
	reg.MustRegister(c.up, c.expires, c.roots, c.asked)
	return c
}

// terms are what an intermediate for a subnet is bound to.
func (c *containerCA) terms(p netip.Prefix) authority.Constraints {
	t := authority.Constraints{Subnets: []netip.Prefix{p}, TrustDomain: authority.TrustDomain(c.cfg.TrustDomain)}
	for _, d := range c.cfg.Domains {
		t.Domains = append(t.Domains, registration.Name(d))
	}
	return t
}

// look reads the files and, if they hold something else than before, tries it. What cannot be used is told of once, and what was used before stays.
func (c *containerCA) look(context.Context) error {
	all, root, err := c.read()
	news := !bytes.Equal(all, c.tried)
	if r := c.root.Load(); !news && !c.failing && r != nil && time.Now().Before(r.Certificate().NotAfter) {
		return nil
	}
	if err == nil {
		err = root.Check(c.terms(c.network), time.Now())
	}
	if err != nil {
		c.up.Set(0)
		if news || !c.failing {
			c.log.Error("container ca cannot be used", "error", err, "cert", c.cfg.CertFile, "key", c.cfg.KeyFile, "another_in_use", c.root.Load() != nil)
		}
		c.tried, c.failing = all, true
		return nil
	}
	c.tried, c.failing = all, false
	c.root.Store(root)
	c.up.Set(1)
	c.expires.Set(float64(root.Certificate().NotAfter.Unix()))
	c.roots.Set(float64(len(root.Bundle().Certificates())))
	c.log.Info("container ca loaded", "root", root.Certificate().Subject.String(), "expires", root.Certificate().NotAfter, "roots", len(root.Bundle().Certificates()))
	return nil
}

// read returns the root in the files, and all that it was decided from.
func (c *containerCA) read() (all []byte, root *authority.Root, err error) {
	cert, _, err1 := readRootFile(c.cfg.CertFile)
	key, mode, err2 := readRootFile(c.cfg.KeyFile)
	clients, _, err3 := readRootFile(c.clients)
	err = errors.Join(err1, err2, err3)
	all = fmt.Appendf(nil, "%s\x00%s\x00%s\x00%v\x00%v", cert, key, clients, mode, err)
	if err != nil {
		return all, nil, err
	}
	// A group may read it, as deployments give the files of a program to its group.
	if mode.Perm()&0o027 != 0 {
		return all, nil, fault.Deniedf("%s has the mode %#o: others can read or change it; make it 0600, and a new root if somebody may have", c.cfg.KeyFile, mode.Perm())
	}
	if root, err = authority.ParseRoot(cert, key); err != nil {
		return all, nil, err
	}
	return all, root, apart(root.Bundle(), clients)
}

// apart refuses a root that also vouches for our clients: whatever a host signs for its containers would be let in to the lease API.
func apart(b authority.Bundle, clients []byte) error {
	for {
		var block *pem.Block
		if block, clients = pem.Decode(clients); block == nil {
			return nil
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			continue
		}
		for _, r := range b.Certificates() {
			if bytes.Equal(r.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo) {
				return fault.Deniedf("the root %v is in ca_cert_file as well: containers would pass for hosts; make a root of its own", r.Subject)
			}
		}
	}
}

func readRootFile(path string) ([]byte, os.FileMode, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxRootFile+1))
	if err == nil && len(b) > maxRootFile {
		err = fmt.Errorf("%s has more than %d bytes", path, maxRootFile)
	}
	return b, st.Mode(), err
}

// current returns the root that issues.
func (c *containerCA) current() (*authority.Root, error) {
	if r := c.root.Load(); r != nil {
		return r, nil
	}
	return nil, fault.Unavailablef("the files of the container CA cannot be used: see the log")
}

// beside serves the container CA for what begins with its path, and next for all else.
func (c *containerCA) beside(next http.Handler, store *leasesql.Store, requests *metrics.Requests) http.Handler {
	t := c.terms(c.network)
	ca := authorityhttp.Handler(authorityhttp.Source{
		Root: c.current, Subnets: func(ctx context.Context, host netip.Addr) ([]netip.Prefix, error) { return subnetsOf(ctx, store, host) },
		Domains: t.Domains, TrustDomain: t.TrustDomain, Validity: time.Duration(c.cfg.Seconds) * time.Second,
	}, c.log, authorityhttp.HandlerOptions{
		Observe: requests.Observe(), Count: func(o authorityhttp.Outcome) { c.asked.WithLabelValues(string(o)).Inc() },
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, authorityhttp.Prefix) {
			ca.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// subnetsOf returns the subnets of the leases that a host holds: active ones, as the database has had them within the last second.
func subnetsOf(ctx context.Context, store *leasesql.Store, host netip.Addr) ([]netip.Prefix, error) {
	sn, err := store.Snapshot(ctx)
	if err != nil {
		return nil, fmt.Errorf("read leases: %w", err)
	}
	var all []netip.Prefix
	for _, l := range sn.Leases {
		if l.Underlay == host {
			all = append(all, l.Subnet)
		}
	}
	return all, nil
}
