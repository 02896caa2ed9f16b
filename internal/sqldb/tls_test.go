package sqldb_test

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/internal/testkit/pki"
)

// TestTLS connects to servers with a certificate for 127.0.0.1 and with one for another host.
func TestTLS(t *testing.T) {
	ca, err := pki.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := pki.OpenCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for engine, start := range map[string]func(context.Context, testkit.Options) (*testkit.Server, error){
		sqldb.Postgres: testkit.StartPostgres, sqldb.MySQL: testkit.StartMariaDB,
	} {
		for name, addr := range map[string]string{"right": "127.0.0.1", "wrong": "192.0.2.1"} {
			t.Run(engine+"/"+name+" name", func(t *testing.T) {
				cert, key, err := ca.Issue(engine+"-"+name, netip.MustParseAddr(addr))
				if err != nil {
					t.Fatal(err)
				}
				port, err := testkit.FreePort()
				if err != nil {
					t.Fatal(err)
				}
				s, err := start(t.Context(), testkit.Options{Cert: cert, Key: key, Port: port})
				testkit.Require(t, engine, err)
				defer s.Stop()
				if engine == sqldb.MySQL {
					for _, q := range []string{"CREATE USER u@'127.0.0.1' IDENTIFIED BY 'it''s a \"secret\"'", "GRANT ALL ON *.* TO u@'127.0.0.1'"} {
						if err := s.Admin(t.Context(), q); err != nil {
							t.Fatal(err)
						}
					}
				}
				cfg := s.Config("")
				if engine == sqldb.MySQL {
					cfg.User, cfg.Password = "u", `it's a "secret"`
				}
				cfg.Host, cfg.Port, cfg.RequireSSL, cfg.Timeout = "127.0.0.1", uint16(port), true, 30
				start := time.Now()
				check := func(what, caFile string, skip, want bool) {
					t.Helper()
					c := cfg
					c.CACert, c.SkipHost = caFile, skip
					db, err := sqldb.Open(t.Context(), c)
					if err == nil {
						db.Close()
					}
					if (err == nil) != want {
						t.Errorf("%s: %v, want success %v", what, err, want)
					}
				}
				check("our authority", ca.CertFile(), false, name == "right")
				check("our authority, any name", ca.CertFile(), true, true)
				check("another authority", stranger.CertFile(), false, false)
				check("another authority, any name", stranger.CertFile(), true, false)
				cfg.User = "nobody"
				check("another user", ca.CertFile(), true, false)
				if took := time.Since(start); took > 15*time.Second {
					t.Errorf("took %v: what cannot succeed was tried again", took)
				}
			})
		}
	}
}
