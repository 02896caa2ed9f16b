package controller

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"code.cloudfoundry.org/silk/lease/leasesql"
)

// RenewEpoch is what an operator runs after the database was restored from a copy: daemons then take the next list for one
// of another history, adopt what is new in it at once, and keep what it lacks until those hosts had time to renew.
// Controllers may run meanwhile.
func RenewEpoch(ctx context.Context, cfg Config, log *slog.Logger) error {
	p, err := build(cfg, log)
	if err != nil {
		return err
	}
	s, err := leasesql.Open(ctx, p.store, log)
	if err != nil {
		return fmt.Errorf("connect to the database: %w", err)
	}
	defer s.Close()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	r, err := s.RenewEpoch(ctx)
	if err != nil {
		return fmt.Errorf("renew epoch: %w", err)
	}
	log.Info("epoch renewed", "revision", r.String())
	return nil
}
