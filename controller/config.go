package controller

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/lease"
)

// Config is the configuration file. Its keys are those of the deployed controller, and some optional ones of ours at
// the end. docs/operate/controller.md explains each.
type Config struct {
	ListenHost      string `json:"listen_host"`
	ListenPort      int    `json:"listen_port"`       // 0: any free one
	HealthCheckPort int    `json:"health_check_port"` // on 127.0.0.1; 0: any free one
	DebugServerPort int    `json:"debug_server_port"` // on 127.0.0.1; 0: any free one

	CACertFile     string `json:"ca_cert_file"`
	ServerCertFile string `json:"server_cert_file"`
	ServerKeyFile  string `json:"server_key_file"`

	Network            netip.Prefix `json:"network"`
	SubnetPrefixLength int          `json:"subnet_prefix_length"`
	LeaseExpiration    int          `json:"lease_expiration_seconds"`
	StalenessThreshold int          `json:"staleness_threshold_seconds"`
	MetricsEmit        int          `json:"metrics_emit_seconds"` // between two looks at how full the range is

	MaxOpenConnections     int           `json:"max_open_connections"`             // 0: no limit
	MaxIdleConnections     int           `json:"max_idle_connections"`             // 0: 10
	ConnectionsMaxLifetime int           `json:"connections_max_lifetime_seconds"` // 0: for ever
	Database               *sqldb.Config `json:"database"`                         // nil: SQLite at DefaultPath

	ReuseDelay                int    `json:"reuse_delay_seconds"`
	BindUnderlayToCertificate bool   `json:"bind_underlay_to_certificate"`
	LogLevel                  string `json:"log_level"`

	ContainerCA

	Warnings []string        `json:"-"` // of Load, to be logged by Run
	Level    *slog.LevelVar  `json:"-"` // what the debug server sets; nil: it sets nothing
	Started  func(Addresses) `json:"-"` // called once when requests are served; nil: nobody asks
}

// DefaultPath is the database of a controller whose configuration has none.
const DefaultPath = "/var/lib/silk/controller.db"

// ignored lists the keys that deployments render and that mean nothing here.
var ignored = []string{"metron_port", "log_prefix"}

// Defaults returns a Config that lacks only the three certificate files.
func Defaults() Config {
	return Config{
		ListenHost: "0.0.0.0", ListenPort: 4103, HealthCheckPort: 19683, DebugServerPort: 46455,
		Network: netip.MustParsePrefix("10.255.0.0/16"), SubnetPrefixLength: 24,
		LeaseExpiration: 7 * 24 * 3600, StalenessThreshold: 3600, MetricsEmit: 30,
		MaxOpenConnections: 200, MaxIdleConnections: 10, ConnectionsMaxLifetime: 3600,
		ReuseDelay: 3600, LogLevel: "info",
		ContainerCA: ContainerCA{Domains: []string{"apps.internal"}, TrustDomain: "silk.internal", Seconds: 7 * 24 * 3600},
	}
}

// Load reads the file at path over the defaults.
func Load(path string) (Config, error) {
	c := Defaults()
	if path == "" {
		return c, errors.New("no configuration: start with -config FILE")
	}
	var err error
	c.Warnings, err = config.Load(path, &c, ignored...)
	return c, err
}

// Validate implements config.Validator.
func (c *Config) Validate(p *config.Problems) {
	p.Require("listen_host", c.ListenHost != "", "an address to listen on such as 0.0.0.0")
	for _, k := range []struct {
		key string
		n   int
	}{{"listen_port", c.ListenPort}, {"health_check_port", c.HealthCheckPort}, {"debug_server_port", c.DebugServerPort}} {
		if k.n < 0 || k.n > 65535 {
			p.Addf(k.key, "%d: expected a port between 0 and 65535", k.n)
		}
	}
	for _, k := range []struct{ key, file string }{
		{"ca_cert_file", c.CACertFile}, {"server_cert_file", c.ServerCertFile}, {"server_key_file", c.ServerKeyFile},
	} {
		p.Require(k.key, k.file != "", "the path of a file in PEM form")
	}
	c.Network = c.Network.Masked() // as the deployed controller takes it
	_, err := lease.NewPool(c.Network, c.SubnetPrefixLength)
	p.Check("network", err)
	for _, k := range []struct {
		key    string
		n, min int
	}{
		{"lease_expiration_seconds", c.LeaseExpiration, 1}, {"staleness_threshold_seconds", c.StalenessThreshold, 1},
		{"metrics_emit_seconds", c.MetricsEmit, 1}, {"max_open_connections", c.MaxOpenConnections, 0},
		{"max_idle_connections", c.MaxIdleConnections, 0}, {"connections_max_lifetime_seconds", c.ConnectionsMaxLifetime, 0},
		{"reuse_delay_seconds", c.ReuseDelay, 1},
	} {
		if k.n < k.min || k.n > maxSeconds {
			p.Addf(k.key, "%d: expected a whole number between %d and %d", k.n, k.min, maxSeconds)
		}
	}
	if _, ok := service.ParseLevel(c.LogLevel); !ok {
		p.Addf("log_level", "%q: expected debug, info, warn or error", c.LogLevel)
	}
	c.ContainerCA.validate(p)
	if c.Database == nil {
		c.Database = &sqldb.Config{Type: sqldb.SQLite}
	}
	if c.Database.Type == sqldb.SQLite && c.Database.Path == "" {
		c.Database.Path = DefaultPath
	}
	c.Database.Validate(p, "database")
}

// maxSeconds is what fits the 32-bit arithmetic of databases.
const maxSeconds = 1<<31 - 1

func seconds(n int) time.Duration { return time.Duration(n) * time.Second }

func hostPort(host string, port int) string { return net.JoinHostPort(host, strconv.Itoa(port)) }
