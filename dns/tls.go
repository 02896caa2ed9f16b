package dns

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"

	"code.cloudfoundry.org/silk/internal/service"
)

// suites are those that the deployed programs agree on for TLS 1.2, and the same for certificates with elliptic curves.
var suites = []uint16{
	tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
}

// tls returns how to speak to servers of NATS. The errors are worded as by the deployed controller.
func (n *NATS) tls() (*tls.Config, error) {
	b, err := os.ReadFile(n.CACerts)
	if err != nil {
		return nil, fmt.Errorf("error reading NATS CA certs: %w", err)
	}
	if !x509.NewCertPool().AppendCertsFromPEM(b) {
		return nil, errors.New("unable to build NATS CA pool: " + n.CACerts + " holds no certificate in PEM form")
	}
	tc, err := service.Certificates{CA: n.CACerts, Cert: n.CertChain, Key: n.PrivateKey}.Client()
	if err != nil {
		return nil, fmt.Errorf("error reading NATS mTLS client auth: %w", err)
	}
	tc.CipherSuites = suites
	return tc, nil
}

// serverTLS returns how the lookup API speaks (section 2.9 of the contract).
func (c *Config) serverTLS() (*tls.Config, error) {
	tc, err := service.Certificates{CA: c.CACert, Cert: c.ServerCert, Key: c.ServerKey}.Server()
	if err != nil {
		return nil, err
	}
	tc.CipherSuites, tc.CurvePreferences = suites, []tls.CurveID{tls.CurveP384, tls.CurveP256}
	return tc, nil
}
