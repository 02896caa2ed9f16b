package policyserver

import (
	"context"
	"fmt"
	"log/slog"

	"code.cloudfoundry.org/silk/internal/config"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/policy/policysql"
)

// Options are what the command line says beside the configuration.
type Options struct {
	Import     bool   // take a deployed policy-server's data over, then end
	From       string // its configuration; empty: its tables are beside ours
	RenewEpoch bool   // say that the database was restored from a copy, then end
}

// Main is Run, or what the options say instead, with a log on standard output.
func Main(ctx context.Context, cfg Config, o Options) error {
	level, _ := service.ParseLevel(cfg.LogLevel)
	log, v := service.Logger("policy-server", level)
	cfg.Level = v
	switch {
	case o.Import:
		return Import(ctx, cfg, o.From, log)
	case o.RenewEpoch:
		return RenewEpoch(ctx, cfg, log)
	}
	return Run(ctx, cfg, log)
}

// Import takes the policies, tags and security groups of a deployed policy-server over, once: from the database that the configuration at path from names, or, when from
// is empty, from the tables beside our own.
func Import(ctx context.Context, cfg Config, from string, log *slog.Logger) error {
	var source sqldb.Config
	if from != "" {
		other := Defaults()
		if _, err := config.Load(from, &other, ignored...); err != nil {
			return err
		}
		source = *other.Database
	}
	return with(ctx, cfg, log, func(s *policysql.Store) error {
		got, err := s.Import(ctx, source)
		if err != nil {
			return fmt.Errorf("import: %w", err)
		}
		for _, why := range got.Reasons {
			log.Warn("row was left out", "reason", why)
		}
		log.Info("imported", "policies", got.Policies, "groups", got.Groups, "security_groups", got.SecurityGroups, "skipped", got.Skipped, "revision", got.Revision.String())
		return nil
	})
}

// RenewEpoch is what an operator runs after the database was restored from a copy: agents then take the next list for one of another
// history. Servers may run meanwhile.
func RenewEpoch(ctx context.Context, cfg Config, log *slog.Logger) error {
	return with(ctx, cfg, log, func(s *policysql.Store) error {
		r, err := s.RenewEpoch(ctx)
		if err != nil {
			return fmt.Errorf("renew epoch: %w", err)
		}
		log.Info("epoch renewed", "revision", r.String())
		return nil
	})
}

func with(ctx context.Context, cfg Config, log *slog.Logger, f func(s *policysql.Store) error) error {
	s, err := policysql.Open(ctx, cfg.store(), log)
	if err != nil {
		return fmt.Errorf("connect to the database: %w", err)
	}
	defer s.Close()
	return f(s)
}
