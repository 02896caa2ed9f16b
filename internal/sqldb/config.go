package sqldb

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	_ "modernc.org/sqlite"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/config"
)

// Config is the "database" object of a configuration file, with the limits of the pool, which the file has elsewhere.
type Config struct {
	Type     string `json:"type"` // "sqlite", "postgres" or "mysql"
	Path     string `json:"path"` // of an SQLite database file; its directory is made if it is not there
	User     string `json:"user"`
	Password string `json:"password"`
	Host     string `json:"host"` // a name, an address, or a path: the directory of PostgreSQL's socket, MySQL's socket itself
	Port     uint16 `json:"port"`
	Name     string `json:"database_name"`

	Timeout    int    `json:"timeout"` // seconds to connect, and for one statement; default 120
	RequireSSL bool   `json:"require_ssl"`
	CACert     string `json:"ca_cert"`                  // file with the authorities that may have signed the server's certificate
	SkipHost   bool   `json:"skip_hostname_validation"` // the certificate may name any host, but must still be signed by them

	MaxOpen     int           `json:"-"` // connections; 0: no limit
	MaxIdle     int           `json:"-"` // connections kept; 0: 10
	MaxLifetime time.Duration `json:"-"` // of a connection; 0: for ever

	causal bool // a node of a Galera cluster: reads wait for what other nodes have committed
}

// Validate adds to p what is wrong with c, whose keys stand below path ("database").
func (c Config) Validate(p *config.Problems, path string) {
	at := func(key string) string { return strings.TrimPrefix(path+"."+key, ".") }
	if _, ok := dialects[c.Type]; !ok {
		p.Addf(at("type"), "%q is not an engine: expected %s, %s or %s", c.Type, SQLite, Postgres, MySQL)
		return
	}
	if c.Timeout < 0 {
		p.Addf(at("timeout"), "%d: expected a number of seconds, at least 1", c.Timeout)
	}
	if c.Type == SQLite {
		p.Require(at("path"), c.Path != "", "the path of the database file")
		return
	}
	p.Require(at("host"), c.Host != "", "the address of the server")
	p.Require(at("user"), c.User != "", "a user of the server")
	p.Require(at("port"), c.Port != 0 || strings.HasPrefix(c.Host, "/"), "the port of the server")
	p.Require(at("ca_cert"), c.CACert != "" || !c.RequireSSL, "the file of the authority that signed the server's certificate, because require_ssl is set")
}

func (c Config) timeout() time.Duration { return time.Duration(c.Timeout) * time.Second }

func (c Config) withDefaults() Config {
	if c.Timeout <= 0 {
		c.Timeout = 120
	}
	if c.MaxIdle == 0 {
		c.MaxIdle = 10
	}
	return c
}

// connector returns the pool of c's driver. It does not connect yet.
func (c Config) connector() (*sql.DB, error) {
	var pool *sql.DB
	var err error
	switch c.Type {
	case Postgres:
		pool, err = c.postgres()
	case MySQL:
		pool, err = c.mysql()
	default:
		pool, err = c.sqlite()
	}
	if err != nil {
		return nil, err
	}
	pool.SetMaxOpenConns(c.MaxOpen)
	pool.SetMaxIdleConns(c.MaxIdle)
	pool.SetConnMaxLifetime(c.MaxLifetime)
	return pool, nil
}

// sqlite makes every transaction take the write lock at its begin, so that it cannot fail half way for want of it.
func (c Config) sqlite() (*sql.DB, error) {
	if err := prepareFile(c.Path); err != nil {
		return nil, err
	}
	q := url.Values{"_txlock": {"immediate"}, "_pragma": {
		fmt.Sprintf("busy_timeout(%d)", min(c.timeout(), busyLimit).Milliseconds()), "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)",
	}}
	return sql.Open("sqlite", "file:"+(&url.URL{Path: c.Path}).EscapedPath()+"?"+q.Encode())
}

// busyLimit bounds how long SQLite itself waits for the lock of a file: it does so without a look at the context. DB.Again goes on waiting.
const busyLimit = 2 * time.Second

// prepareFile makes the database file, readable by its owner only, and its directory, unless they are there.
func prepareFile(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fault.New(fault.Unavailable, fmt.Errorf("make the database's directory: %w", err))
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fault.New(fault.Unavailable, fmt.Errorf("make the database file: %w", err))
	}
	return f.Close()
}

// statementLimit bounds one statement, however long connecting may take.
const statementLimit = 30 * time.Second

func (c Config) postgres() (*sql.DB, error) {
	pc, err := pgx.ParseConfig("sslmode=disable") // the rest is set below, so that no text needs quoting
	if err != nil {
		return nil, fault.New(fault.Invalid, err)
	}
	pc.Host, pc.Port, pc.Database, pc.User, pc.Password = c.Host, c.Port, c.Name, c.User, c.Password
	if pc.Port == 0 {
		pc.Port = 5432
	}
	if pc.TLSConfig, err = c.tls(); err != nil {
		return nil, err
	}
	pc.Fallbacks, pc.ConnectTimeout = nil, c.timeout()
	limit := strconv.FormatInt(min(c.timeout(), statementLimit).Milliseconds(), 10)
	pc.RuntimeParams = map[string]string{
		"application_name": "silk", "statement_timeout": limit, "lock_timeout": "5000", "idle_in_transaction_session_timeout": "10000",
	}
	// Statements are prepared once for each connection, which halves the cost of short ones.
	pc.DefaultQueryExecMode = pgx.QueryExecModeCacheStatement
	return stdlib.OpenDB(*pc, stdlib.OptionAfterConnect(planOnce)), nil
}

// planOnce makes a connection keep one plan for each prepared statement. Lists are arguments of ours, and planning for each of them anew would cost as
// much as what is then done for some dozen rows. As a plan that was made while a table was small has to serve when it has grown, it must use
// the index from the start; and compiling plans never pays here. Servers that do not know a setting do without.
func planOnce(ctx context.Context, c *pgx.Conn) error {
	_, err := c.Exec(ctx, `SELECT set_config(name, CASE name WHEN 'plan_cache_mode' THEN 'force_generic_plan' ELSE 'off' END, false)
		FROM pg_settings WHERE name IN ('plan_cache_mode', 'enable_seqscan', 'jit')`, pgx.QueryExecModeSimpleProtocol)
	return err
}

func (c Config) mysql() (*sql.DB, error) {
	mc := mysql.NewConfig()
	mc.User, mc.Passwd, mc.DBName = c.User, c.Password, c.Name
	mc.Net, mc.Addr = "tcp", net.JoinHostPort(c.Host, strconv.Itoa(int(c.Port)))
	if strings.HasPrefix(c.Host, "/") {
		mc.Net, mc.Addr = "unix", c.Host
	}
	mc.Timeout, mc.ReadTimeout, mc.WriteTimeout = c.timeout(), c.timeout(), c.timeout()
	mc.ClientFoundRows = true   // an update that changes nothing still says which rows it met
	mc.InterpolateParams = true // one round trip per statement
	// A client that is gone without a word keeps its locks until the server gives it up: by default after 8 hours. Idle connections of ours that end are
	// opened again.
	mc.Params = map[string]string{"innodb_lock_wait_timeout": "5", "wait_timeout": "15"}
	if c.causal {
		mc.Params["wsrep_sync_wait"] = "1"
	}
	mc.Logger = &mysql.NopLogger{}
	var err error
	if mc.TLS, err = c.tls(); err != nil {
		return nil, err
	}
	k, err := mysql.NewConnector(mc)
	if err != nil {
		return nil, fault.New(fault.Invalid, err)
	}
	return sql.OpenDB(k), nil
}

// tls returns nil when the connection is to be in the clear. Without the check of the host's name the chain is still verified.
func (c Config) tls() (*tls.Config, error) {
	if !c.RequireSSL {
		return nil, nil
	}
	pem, err := os.ReadFile(c.CACert)
	if err != nil {
		return nil, fault.New(fault.Invalid, fmt.Errorf("read database.ca_cert: %w", err))
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fault.Invalidf("database.ca_cert %s: holds no certificate", c.CACert)
	}
	tc := &tls.Config{RootCAs: roots, ServerName: c.Host, MinVersion: tls.VersionTLS12}
	if c.SkipHost {
		tc.InsecureSkipVerify = true // replaced by what follows, which differs only in leaving out the name
		tc.VerifyConnection = func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("the database server sent no certificate")
			}
			opts := x509.VerifyOptions{Roots: roots, Intermediates: x509.NewCertPool()}
			for _, cert := range s.PeerCertificates[1:] {
				opts.Intermediates.AddCert(cert)
			}
			_, err := s.PeerCertificates[0].Verify(opts)
			return err
		}
	}
	return tc, nil
}

// pause waits before attempt n+1: a jittered delay that doubles from first up to limit. It returns ctx's error if that ends.
func pause(ctx context.Context, first, limit time.Duration, n int) error {
	t := time.NewTimer(backoff(first, limit, n))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
