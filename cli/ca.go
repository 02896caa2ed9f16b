package cli

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"code.cloudfoundry.org/silk/authority"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/durable"
	"github.com/spf13/cobra"
)

func caCommand() *cobra.Command {
	c := &cobra.Command{Use: "ca", Short: "Make and show the authority that containers' certificates come from"}
	c.AddCommand(caInit(), caShow())
	return c
}

func caInit() *cobra.Command {
	var cert, key, name string
	var years int
	c := &cobra.Command{
		Use: "init --cert FILE --key FILE", Short: "Make a root for the controllers", Args: cobra.NoArgs,
		Long: "Makes the root of the container CA: an ECDSA key on P-256 and its certificate. Put both files on every controller, as container_ca_cert_file and\n" +
			"container_ca_key_file. A file that is there already is never overwritten: to rotate, make a new root beside the old one.",
		Example: "  silk ca init --cert /etc/silk/container-ca.crt --key /etc/silk/container-ca.key",
	}
	c.Flags().StringVar(&cert, "cert", "", "where the certificate goes")
	c.Flags().StringVar(&key, "key", "", "where the key goes, readable to its owner alone")
	c.Flags().StringVar(&name, "name", "Silk container CA", "common name of the root")
	c.Flags().IntVar(&years, "years", 10, "how long it lasts, 1 to 50")
	for _, f := range []string{"cert", "key"} {
		if err := c.MarkFlagRequired(f); err != nil {
			panic(err)
		}
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		if years < 1 || years > 50 {
			return fault.Invalidf("--years %d: expected 1 to 50", years)
		}
		now := time.Now()
		certText, keyText, err := authority.NewRoot(name, now.AddDate(years, 0, 0).Sub(now), now)
		if err != nil {
			return err
		}
		if err := createBoth(key, keyText, cert, certText); err != nil {
			return err
		}
		fmt.Fprintf(c.OutOrStdout(), "%s and %s were made: copy both to every controller; who has the key can speak for every container\n", cert, key)
		return nil
	}
	return c
}

// createBoth writes a key and its certificate. Where one of the two is there already, or cannot be written, neither is made.
func createBoth(key string, keyText []byte, cert string, certText []byte) error {
	for _, path := range []string{key, cert} { // so that mostly nothing has to be taken back
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(fault.Conflictf("%s is there already and is not overwritten", path), err)
		}
	}
	if err := create(key, keyText, 0o600); err != nil {
		return err
	}
	if err := create(cert, certText, 0o644); err != nil {
		return errors.Join(err, os.Remove(key))
	}
	return nil
}

// create makes a file that must not be there.
func create(path string, b []byte, mode os.FileMode) error {
	err := durable.Create(path, mode, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
	if errors.Is(err, fs.ErrExist) {
		return fault.Conflictf("%s is there already and is not overwritten", path)
	}
	return err
}

// shownCertificate is what silk ca show tells of one certificate.
type shownCertificate struct {
	Subject     string    `json:"subject"`
	Issuer      string    `json:"issuer"`
	Key         string    `json:"key"`
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
	Authority   bool      `json:"authority"`
	May         []string  `json:"may_sign_for,omitempty"` // constraints of an intermediate
	Names       []string  `json:"names,omitempty"`        // of a leaf: DNS names, addresses and URIs
	Fingerprint string    `json:"sha256"`
}

func caShow() *cobra.Command {
	var form string
	c := &cobra.Command{
		Use: "show FILE", Short: "Show the certificates in a file: roots, an intermediate or a leaf", Args: cobra.ExactArgs(1),
		Example: "  silk ca show /etc/silk/container-ca.crt",
	}
	c.Flags().StringVarP(&form, "output", "o", tables, "table or json")
	c.RunE = func(c *cobra.Command, args []string) error {
		f, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer f.Close()
		const limit = 1 << 20
		b, err := io.ReadAll(io.LimitReader(f, limit+1))
		if err == nil && len(b) > limit {
			err = fault.Invalidf("more than %d bytes", limit)
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", args[0], err)
		}
		certs, err := authority.ParseCertificates(b)
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		var all []shownCertificate
		for _, x := range certs {
			all = append(all, shown(x))
		}
		switch form {
		case jsonForm:
			return json.NewEncoder(c.OutOrStdout()).Encode(all)
		case tables:
			return writeCertificates(c.OutOrStdout(), all, time.Now())
		}
		return fault.Invalidf("output %q: expected table or json", form)
	}
	return c
}

func shown(x *x509.Certificate) shownCertificate {
	s := shownCertificate{
		Subject: x.Subject.String(), Issuer: x.Issuer.String(), Key: keyName(x.PublicKey), NotBefore: x.NotBefore.UTC(), NotAfter: x.NotAfter.UTC(),
		Authority: x.IsCA, Fingerprint: fmt.Sprintf("%x", sha256.Sum256(x.Raw)), Names: x.DNSNames,
	}
	for _, n := range x.PermittedIPRanges {
		s.May = append(s.May, n.String())
	}
	s.May = append(s.May, x.PermittedDNSDomains...)
	for _, d := range x.PermittedURIDomains {
		s.May = append(s.May, "spiffe://"+d)
	}
	for _, a := range x.IPAddresses {
		s.Names = append(s.Names, a.String())
	}
	for _, u := range x.URIs {
		s.Names = append(s.Names, u.String())
	}
	return s
}

func keyName(public any) string {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + k.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	}
	return strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%T", public), "*"), ".PublicKey")
}

// writeCertificates quotes what certificates say of themselves: it may be anything.
func writeCertificates(w io.Writer, all []shownCertificate, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for i, s := range all {
		if i > 0 {
			fmt.Fprintln(t)
		}
		state := fmt.Sprintf("%.1f days left", s.NotAfter.Sub(now).Hours()/24)
		switch {
		case now.Before(s.NotBefore):
			state = "not valid yet"
		case !now.Before(s.NotAfter):
			state = "expired"
		}
		kind := "leaf"
		if s.Authority {
			kind = "authority"
		}
		fmt.Fprintf(t, "subject\t%s\n", printable(s.Subject))
		fmt.Fprintf(t, "issuer\t%s\n", printable(s.Issuer))
		fmt.Fprintf(t, "kind\t%s, %s\n", kind, s.Key)
		fmt.Fprintf(t, "valid\t%s to %s, %s\n", s.NotBefore.Format(time.RFC3339), s.NotAfter.Format(time.RFC3339), state)
		if len(s.May) > 0 {
			fmt.Fprintf(t, "may sign for\t%s\n", printable(strings.Join(s.May, " ")))
		}
		if len(s.Names) > 0 {
			fmt.Fprintf(t, "names\t%s\n", printable(strings.Join(s.Names, " ")))
		}
		fmt.Fprintf(t, "sha256\t%s\n", s.Fingerprint)
	}
	return t.Flush()
}
