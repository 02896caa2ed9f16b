package policyserver

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policyserver/auth"
)

// Config is the configuration file. Its keys are those of the deployed policy-server, policy-server-internal and policy-server-asg-syncer, each of whose files is
// one for this program, and optional ones of ours. docs/operate/policy-server.md explains each.
type Config struct {
	ListenHost     string `json:"listen_host"`
	ListenPort     *int   `json:"listen_port"` // of the external API; nil: it is not served; 0: any free one
	EnableTLS      bool   `json:"enable_tls"`  // on the external API
	ServerCertFile string `json:"server_cert_file"`
	ServerKeyFile  string `json:"server_key_file"`

	InternalListenHost     string   `json:"internal_listen_host"` // default listen_host
	InternalListenPort     *int     `json:"internal_listen_port"` // of the internal API; nil: it is not served; 0: any free one
	InternalServerCertFile string   `json:"internal_server_cert_file"`
	InternalServerKeyFile  string   `json:"internal_server_key_file"` // both default to the external API's
	CACertFile             string   `json:"ca_cert_file"`             // authorities of the internal API's clients
	InternalClients        []string `json:"internal_clients"`         // names of certificates; nil: any of the authorities
	BindUnderlay           bool     `json:"bind_underlay_to_certificate"`

	HealthCheckPort *int   `json:"health_check_port"` // on 127.0.0.1; nil: 31946 with the internal API, otherwise none
	DebugServerHost string `json:"debug_server_host"`
	DebugServerPort *int   `json:"debug_server_port"` // nil: 31821 with the external API, otherwise 31945

	Auth      []string           `json:"auth"` // methods, in order; nil: those that are configured
	TokenFile string             `json:"token_file"`
	MTLS      *auth.Certificates `json:"mtls"`
	OIDC      *auth.OIDCConfig   `json:"oidc"`

	UAAClient         string `json:"uaa_client"`
	UAAClientSecret   string `json:"uaa_client_secret"`
	UAACA             string `json:"uaa_ca"`
	UAAURL            string `json:"uaa_url"`
	UAAPort           int    `json:"uaa_port"`
	UAAIssuer         string `json:"uaa_issuer"`
	CCURL             string `json:"cc_url"`
	CCCA              string `json:"cc_ca_cert"`
	CCChunk           int    `json:"cc_app_request_chunk_size"`
	SkipSSLValidation bool   `json:"skip_ssl_validation"`
	RequestTimeout    int    `json:"request_timeout"` // seconds, of one call to UAA, Cloud Controller or an issuer

	CCInternalURL   string `json:"cc_internal_url"` // of Cloud Controller's internal API; with it this server follows its security groups
	CCInternalCA    string `json:"cc_internal_ca_cert"`
	CCInternalCert  string `json:"cc_internal_client_cert"`
	CCInternalKey   string `json:"cc_internal_client_key"`
	UUID            string `json:"uuid"`                         // names this server to people who ask which one follows
	ASGPollInterval int    `json:"asg_poll_interval_seconds"`    // between two lists, of a Cloud Controller that does not say when they changed
	ASGStamp        int    `json:"asg_stamp_interval_seconds"`   // between two questions whether they changed
	ASGRefresh      int    `json:"asg_refresh_interval_seconds"` // after which they are read though nothing says that they changed
	ASGPass         int    `json:"retry_deadline_seconds"`       // of one reading of all of them

	SelfService     bool     `json:"enable_space_developer_self_service"`
	AllowedCORS     []string `json:"allowed_cors_domains"`
	MaxPolicies     int      `json:"max_policies"`
	CleanupInterval int      `json:"cleanup_interval"`  // seconds
	CleanupMaxShare float64  `json:"cleanup_max_share"` // of all policies that one clean-up may remove

	TagLength     int  `json:"tag_length"` // bytes
	MaxTag        int  `json:"max_tag"`    // 0: the highest that tag_length allows
	TagQuarantine *int `json:"tag_quarantine_seconds"`

	Database               *sqldb.Config `json:"database"` // nil: SQLite at DefaultPath
	MaxOpenConnections     int           `json:"max_open_connections"`
	MaxIdleConnections     int           `json:"max_idle_connections"`
	ConnectionsMaxLifetime int           `json:"connections_max_lifetime_seconds"`

	LogLevel string `json:"log_level"`

	Warnings []string        `json:"-"` // of Load, to be logged by Run
	Level    *slog.LevelVar  `json:"-"` // what the debug server sets; nil: it sets nothing
	Started  func(Addresses) `json:"-"` // called once when requests are served; nil: nobody asks
}

// DefaultPath is the database of a policy-server whose configuration has none.
const DefaultPath = "/var/lib/silk/policy-server.db"

// ignored lists the keys that deployments render and that mean nothing here.
var ignored = []string{"log_prefix", "metron_address", "database_migration_timeout", "locket_address", "locket_ca_cert_file", "locket_client_cert_file", "locket_client_key_file",
	"locket_client_keepalive_time", "locket_client_keepalive_timeout"}

// Defaults returns a Config that lacks listeners.
func Defaults() Config {
	quarantine := 3600
	return Config{
		ListenHost: "0.0.0.0", DebugServerHost: "127.0.0.1", RequestTimeout: 5, CCChunk: 100,
		MaxPolicies: 150, CleanupInterval: 3600, CleanupMaxShare: 0.25, TagLength: 2, TagQuarantine: &quarantine,
		MaxOpenConnections: 200, MaxIdleConnections: 10, ConnectionsMaxLifetime: 3600, LogLevel: "info",
		ASGPollInterval: 60, ASGStamp: 1, ASGRefresh: 300, ASGPass: 300,
	}
}

// Load reads the file at path over the defaults.
func Load(path string) (Config, error) {
	c := Defaults()
	if path == "" {
		return c, errors.New("no configuration: start with -config-file FILE")
	}
	warnings, err := config.Load(path, &c, ignored...)
	c.Warnings = append(warnings, c.Warnings...)
	return c, err
}

// Validate implements config.Validator. It also fills what depends on other keys.
func (c *Config) Validate(p *config.Problems) {
	c.fill()
	p.Require("listen_port", c.ListenPort != nil || c.InternalListenPort != nil || c.CCInternalURL != "",
		"listen_port for the external API, internal_listen_port for the internal one, cc_internal_url to follow Cloud Controller's security groups, or several")
	p.Require("listen_host", c.ListenHost != "", "an address to listen on such as 0.0.0.0")
	p.Require("debug_server_host", c.DebugServerHost != "", "an address to listen on such as 127.0.0.1")
	c.validateNumbers(p)
	if c.ListenPort != nil {
		c.validateExternal(p)
	}
	if c.CCInternalURL != "" {
		c.validateFollowing(p)
	}
	if c.InternalListenPort != nil {
		for _, k := range []struct{ key, file string }{
			{"ca_cert_file", c.CACertFile}, {"server_cert_file", c.InternalServerCertFile}, {"server_key_file", c.InternalServerKeyFile},
		} {
			p.Require(k.key, k.file != "", "the path of a file in PEM form, because internal_listen_port is set")
		}
	} else if c.CACertFile != "" {
		c.Warnings = append(c.Warnings, `key "ca_cert_file" means nothing without internal_listen_port and is ignored`)
	}
	if c.InternalClients != nil && len(c.InternalClients) == 0 {
		p.Addf("internal_clients", "is empty: expected at least one name, or no such key to let every client of the authorities in")
	}
	if _, ok := service.ParseLevel(c.LogLevel); !ok {
		p.Addf("log_level", "%q: expected debug, info, warn or error", c.LogLevel)
	}
	if c.Database == nil {
		c.Database = &sqldb.Config{Type: sqldb.SQLite}
	}
	if c.Database.Type == sqldb.SQLite && c.Database.Path == "" {
		c.Database.Path = DefaultPath
	}
	c.Database.Validate(p, "database")
}

// fill gives keys that depend on others their defaults.
func (c *Config) fill() {
	port := func(k **int, n int) {
		if *k == nil {
			*k = &n
		}
	}
	if c.ListenPort != nil {
		port(&c.DebugServerPort, 31821)
	}
	if c.InternalListenPort == nil && c.CCInternalURL != "" {
		port(&c.DebugServerPort, 31947)
	}
	port(&c.DebugServerPort, 31945)
	if c.InternalListenPort != nil {
		port(&c.HealthCheckPort, 31946)
	}
	for _, k := range []struct {
		key      *string
		fallback string
	}{
		{&c.InternalListenHost, c.ListenHost}, {&c.InternalServerCertFile, c.ServerCertFile}, {&c.InternalServerKeyFile, c.ServerKeyFile},
		{&c.LogLevel, "info"},
	} {
		if *k.key == "" {
			*k.key = k.fallback
		}
	}
	if c.Auth != nil {
		return
	}
	for _, m := range []struct {
		method string
		there  bool
	}{{"mtls", c.MTLS != nil}, {"tokens", c.TokenFile != ""}, {"uaa", c.UAAURL != ""}, {"oidc", c.OIDC != nil}} {
		if m.there {
			c.Auth = append(c.Auth, m.method)
		}
	}
}

// maxSeconds is what fits the 32-bit arithmetic of databases.
const maxSeconds = 1<<31 - 1

func (c *Config) validateNumbers(p *config.Problems) {
	for _, k := range []struct {
		key string
		n   *int
	}{{"listen_port", c.ListenPort}, {"internal_listen_port", c.InternalListenPort}, {"health_check_port", c.HealthCheckPort}, {"debug_server_port", c.DebugServerPort}} {
		if k.n != nil && (*k.n < 0 || *k.n > 65535) {
			p.Addf(k.key, "%d: expected a port between 0 and 65535", *k.n)
		}
	}
	for _, k := range []struct {
		key         string
		n, min, max int
	}{
		{"max_policies", c.MaxPolicies, 1, maxSeconds}, {"cleanup_interval", c.CleanupInterval, 1, maxSeconds}, {"request_timeout", c.RequestTimeout, 1, 300},
		{"cc_app_request_chunk_size", c.CCChunk, 0, 5000}, {"tag_length", c.TagLength, 1, 3}, {"max_open_connections", c.MaxOpenConnections, 0, maxSeconds},
		{"max_idle_connections", c.MaxIdleConnections, 0, maxSeconds}, {"connections_max_lifetime_seconds", c.ConnectionsMaxLifetime, 0, maxSeconds},
		{"asg_poll_interval_seconds", c.ASGPollInterval, 0, maxSeconds}, {"asg_stamp_interval_seconds", c.ASGStamp, 1, maxSeconds}, {"asg_refresh_interval_seconds", c.ASGRefresh, 1, maxSeconds},
		{"retry_deadline_seconds", c.ASGPass, 1, maxSeconds},
		{"max_tag", c.MaxTag, 0, int(identity.MaxTagOf(max(c.TagLength, 1)))},
	} {
		if k.n < k.min || k.n > k.max {
			p.Addf(k.key, "%d: expected a whole number between %d and %d", k.n, k.min, k.max)
		}
	}
	if q := c.TagQuarantine; q != nil && (*q < 0 || *q > maxSeconds) {
		p.Addf("tag_quarantine_seconds", "%d: expected a whole number between 0 and %d", *q, maxSeconds)
	}
	if !(c.CleanupMaxShare > 0 && c.CleanupMaxShare <= 1) {
		p.Addf("cleanup_max_share", "%v: expected a share of all policies, more than 0 and at most 1", c.CleanupMaxShare)
	}
}

func (c *Config) validateExternal(p *config.Problems) {
	if c.EnableTLS {
		p.Require("server_cert_file", c.ServerCertFile != "", "the path of a file in PEM form, because enable_tls is set")
		p.Require("server_key_file", c.ServerKeyFile != "", "the path of a file in PEM form, because enable_tls is set")
	}
	p.Require("auth", len(c.Auth) > 0, `a list of methods out of "uaa", "oidc", "mtls", "tokens", or the keys of one, such as token_file`)
	for i, m := range c.Auth {
		if slices.Contains(c.Auth[:i], m) {
			p.Addf("auth", "%q is there twice", m)
		}
		switch m {
		case "uaa":
			c.validateUAA(p)
		case "oidc":
			c.validateOIDC(p)
		case "tokens":
			p.Require("token_file", c.TokenFile != "", `the path of a file of tokens, because auth has "tokens"`)
		case "mtls":
			c.validateMTLS(p)
		default:
			p.Addf("auth", "%q: expected uaa, oidc, mtls or tokens", m)
		}
	}
	if c.CCURL != "" && !slices.Contains(c.Auth, "uaa") && c.CCInternalURL == "" {
		p.Addf("cc_url", `is set, but auth has no "uaa": without it there is no token that Cloud Controller would accept`)
	}
}

func (c *Config) validateUAA(p *config.Problems) {
	for _, k := range []struct{ key, value, expected string }{
		{"uaa_client", c.UAAClient, "the name of policy-server's client"}, {"uaa_client_secret", c.UAAClientSecret, "its secret"},
		{"uaa_url", c.UAAURL, "a URL such as https://uaa.service.cf.internal"}, {"cc_url", c.CCURL, "the URL of Cloud Controller"},
	} {
		p.Require(k.key, k.value != "", k.expected)
	}
	if c.UAAPort < 1 || c.UAAPort > 65535 {
		p.Addf("uaa_port", "%d: expected a port between 1 and 65535", c.UAAPort)
	}
	for _, k := range []struct{ key, value string }{{"uaa_url", c.UAAURL}, {"cc_url", c.CCURL}} {
		if k.value != "" {
			p.Check(k.key, checkURL(k.value))
		}
	}
}

// validateFollowing is about what it takes to ask Cloud Controller for security groups.
func (c *Config) validateFollowing(p *config.Problems) {
	if c.ListenPort == nil || !slices.Contains(c.Auth, "uaa") { // which asks for the same
		c.validateUAA(p)
	}
	p.Check("cc_internal_url", checkURL(c.CCInternalURL))
	for _, k := range []struct{ key, file string }{
		{"cc_internal_ca_cert", c.CCInternalCA}, {"cc_internal_client_cert", c.CCInternalCert}, {"cc_internal_client_key", c.CCInternalKey},
	} {
		p.Require(k.key, k.file != "" || c.SkipSSLValidation || strings.HasPrefix(c.CCInternalURL, "http:"), "the path of a file in PEM form, because cc_internal_url is set")
	}
}

func (c *Config) validateOIDC(p *config.Problems) {
	if c.OIDC == nil {
		p.Require("oidc", false, `an object with issuer and audience, because auth has "oidc"`)
		return
	}
	p.Check("oidc.issuer", checkURL(c.OIDC.Issuer))
	p.Require("oidc.audience", c.OIDC.Audience != "", "what tokens for policy-server name as their audience")
	for from, to := range c.OIDC.Scopes {
		if to != "network.admin" && to != "network.write" {
			p.Addf("oidc.scopes", "%q: %q: expected network.admin or network.write", from, to)
		}
	}
}

func (c *Config) validateMTLS(p *config.Problems) {
	if c.MTLS == nil {
		p.Require("mtls", false, `an object with ca_file and admins or writers, because auth has "mtls"`)
		return
	}
	p.Require("mtls.ca_file", c.MTLS.CAFile != "", "the path of a file with the authorities of these certificates")
	if !c.EnableTLS {
		p.Addf("enable_tls", `is not set, but auth has "mtls": certificates are shown in TLS only`)
	}
}

func checkURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return fmt.Errorf("%.200q: expected a URL such as https://host.example", s)
	}
	return nil
}

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }

func hostPort(host string, port int) string {
	return net.JoinHostPort(strings.Trim(host, "[]"), strconv.Itoa(port))
}
