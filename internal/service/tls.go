package service

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"sync"
	"time"
)

// Certificates names the files of one side of mutual TLS.
type Certificates struct{ CA, Cert, Key string }

// Server returns the configuration of a listener that asks every client for a certificate of the CA: TLS 1.2 or 1.3,
// HTTP/1.1 only. The pair is read again once a minute.
func (c Certificates) Server() (*tls.Config, error) {
	pool, err := c.pool()
	if err != nil {
		return nil, err
	}
	p := &pair{cert: c.Cert, key: c.Key}
	if _, err := p.get(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool, NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.get() },
	}, nil
}

// Open returns the configuration of a listener that lets everybody in: TLS 1.2 or 1.3, HTTP/1.1 only. With a CA it asks clients for a certificate, and
// one that is shown must be of the CA. The pair is read again as by Server.
func (c Certificates) Open() (*tls.Config, error) {
	p := &pair{cert: c.Cert, key: c.Key}
	if _, err := p.get(); err != nil {
		return nil, err
	}
	tc := &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.get() },
	}
	if c.CA == "" {
		return tc, nil
	}
	var err error
	tc.ClientAuth = tls.VerifyClientCertIfGiven
	tc.ClientCAs, err = c.pool()
	return tc, err
}

// Client returns the configuration of a caller that shows the pair and trusts only the CA.
func (c Certificates) Client() (*tls.Config, error) {
	pool, err := c.pool()
	if err != nil {
		return nil, err
	}
	p := &pair{cert: c.Cert, key: c.Key}
	if _, err := p.get(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, RootCAs: pool,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return p.get() },
	}, nil
}

func (c Certificates) pool() (*x509.CertPool, error) {
	b, err := os.ReadFile(c.CA)
	if err != nil {
		return nil, fmt.Errorf("read ca certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("read ca certificates: %s holds no certificate in PEM form", c.CA)
	}
	return pool, nil
}

// pair is a certificate and key that follow their files.
type pair struct {
	cert, key string

	mu      sync.Mutex
	loaded  *tls.Certificate
	checked time.Time
}

// get returns the pair. A pair that has become unreadable keeps its last good value.
func (p *pair) get() (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loaded != nil && time.Since(p.checked) < time.Minute {
		return p.loaded, nil
	}
	p.checked = time.Now()
	c, err := tls.LoadX509KeyPair(p.cert, p.key)
	if err != nil {
		if p.loaded != nil {
			return p.loaded, nil
		}
		return nil, fmt.Errorf("load certificate and key: %w", err)
	}
	p.loaded = &c
	return p.loaded, nil
}
