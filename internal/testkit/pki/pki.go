// Package pki makes certificate authorities and certificates for labs and tests: ECDSA P-256, files in PEM form. It is
// not for production: keys lie beside their certificates and nothing is ever revoked.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// CA signs certificates. Its files are DIR/ca.crt and DIR/ca.key.
type CA struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// OpenCA returns the authority in dir, made now if it is not there yet; it is valid for ten years.
func OpenCA(dir string) (*CA, error) {
	ca := &CA{dir: dir}
	if err := ca.load(); err == nil {
		return ca, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := template("silk lab ca", 10*365*24*time.Hour)
	t.IsCA, t.BasicConstraintsValid, t.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	if err := write(dir, "ca", der, key); err != nil {
		return nil, err
	}
	return ca, ca.load()
}

func (ca *CA) load() error {
	c, err := os.ReadFile(filepath.Join(ca.dir, "ca.crt"))
	if err != nil {
		return err
	}
	k, err := os.ReadFile(filepath.Join(ca.dir, "ca.key"))
	if err != nil {
		return err
	}
	cb, _ := pem.Decode(c)
	kb, _ := pem.Decode(k)
	if cb == nil || kb == nil {
		return fmt.Errorf("read certificate authority in %s: not PEM", ca.dir)
	}
	if ca.cert, err = x509.ParseCertificate(cb.Bytes); err != nil {
		return err
	}
	ca.key, err = x509.ParseECPrivateKey(kb.Bytes)
	return err
}

// CertFile returns the path of the authority's certificate.
func (ca *CA) CertFile() string { return filepath.Join(ca.dir, "ca.crt") }

// Issue writes NAME.crt and NAME.key beside the authority's files and returns their paths. The certificate serves both
// ends of TLS for a year, under the common name and as DNS name, with the given addresses.
func (ca *CA) Issue(name string, addrs ...netip.Addr) (cert, key string, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	t := template(name, 365*24*time.Hour)
	t.DNSNames = []string{name, "localhost"}
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, a := range addrs {
		t.IPAddresses = append(t.IPAddresses, net.IP(a.AsSlice()))
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca.cert, &k.PublicKey, ca.key)
	if err != nil {
		return "", "", err
	}
	return filepath.Join(ca.dir, name+".crt"), filepath.Join(ca.dir, name+".key"), write(ca.dir, name, der, k)
}

func template(name string, valid time.Duration) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	now := time.Now()
	return &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(valid)}
}

func write(dir, name string, der []byte, key *ecdsa.PrivateKey) error {
	kb, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	if err := replace(filepath.Join(dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: kb}), 0o600); err != nil {
		return err
	}
	return replace(filepath.Join(dir, name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

// replace writes a file that is whole whenever it is there: who writes it may be killed.
func replace(path string, b []byte, mode os.FileMode) error {
	if err := os.WriteFile(path+".new", b, mode); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
