package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"code.cloudfoundry.org/silk/nat"
	"code.cloudfoundry.org/silk/overlay"
)

// Teardown is silk-teardown: it gives the host's lease back and removes what Silk put on the host, each whether or not the
// other worked. What failed is in the error, joined. With containers attached, or a daemon or policy agent that would put everything
// back, it touches nothing and returns fault.Conflict unless force is set; the containers' own devices and records stay in any case.
func Teardown(ctx context.Context, cfg Config, force bool, log *slog.Logger) error {
	log.Info("starting")
	fabric, err := overlay.Open(nil)
	if err != nil {
		return err
	}
	defer fabric.Close()
	records, err := endpoint.Open(cfg.EndpointDir)
	if err != nil {
		log.Warn("endpoint directory cannot be used", "error", err)
		records = nil
	}
	unlock, err := mayTearDown(ctx, cfg, records, force, log)
	if err != nil {
		return err
	}
	defer unlock()

	var errs []error
	try := func(what string, err error) {
		if err != nil {
			log.Error(what, "error", err)
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	try("release subnet lease", release(ctx, cfg))
	try("delete vtep", removeOverlay(ctx, cfg, fabric))
	try("remove local addresses", removeLocal())
	try("delete policy table", removePolicies(ctx, cfg, records, log))
	try("remove state", State{dir: cfg.StateDir}.Remove())
	if records != nil {
		try("restore sysctls", records.Sysctls().Restore())
		try("remove endpoint directory", removeRecords(ctx, cfg, records))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	log.Info("complete")
	return nil
}

// release gives the lease back.
func release(ctx context.Context, cfg Config) error {
	tc, err := cfg.certificates().Client()
	if err != nil {
		return fmt.Errorf("create tls config: %w", err)
	}
	client := leasehttp.NewClient(cfg.ConnectivityServerURL, tc, leasehttp.ClientOptions{Timeout: cfg.timeout(), Traceparent: os.Getenv("TRACEPARENT")})
	defer client.Close()
	return client.Release(ctx, cfg.Underlay())
}

// mayTearDown makes sure that nobody needs what is about to go.
func mayTearDown(ctx context.Context, cfg Config, records *endpoint.Dir, force bool, log *slog.Logger) (unlock func(), err error) {
	unlock = func() {}
	c := attachments{records, cfg.Datastore}.count(ctx)
	if c.Err != nil {
		log.Warn("containers could not be counted", "error", c.Err)
	}
	if c.Live > 0 && !force {
		return unlock, fault.Conflictf("%d containers are attached to this host: remove them first, or cut them off with -force", c.Live)
	}
	held, err := nft.Held(nil)
	if err != nil {
		return unlock, err
	}
	if held && !force {
		return unlock, fault.Conflictf("vxlan-policy-agent is running on this host and keeps its rules: stop it first")
	}
	f, err := os.OpenFile(filepath.Join(cfg.StateDir, lockFile), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return unlock, nil
	}
	if err != nil {
		return unlock, fmt.Errorf("open state directory: %w", err)
	}
	wait, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := kernel.Flock(wait, f); err != nil {
		f.Close()
		if !force {
			return unlock, fault.Conflictf("silk-daemon is running on this host and would put everything back: stop it first")
		}
		log.Warn("silk-daemon is running and will put everything back")
		return unlock, nil
	}
	return func() { f.Close() }, nil
}

// removeOverlay removes the rules, the VTEP and all that is on it. A VTEP that is not there is an error, as it is with
// the deployed program, but only after everything else is gone.
func removeOverlay(ctx context.Context, cfg Config, fabric *overlay.Fabric) error {
	was, err := observeDevice(cfg.VTEPName, cfg.Overlay())
	err = errors.Join(err, nat.Remove(ctx, nil), fabric.Remove(ctx, cfg.VTEPName))
	if err == nil && !was.Exists {
		return fault.NotFoundf("find link %s: Link not found", cfg.VTEPName)
	}
	return err
}

// removeLocal takes away the addresses at which containers reach programs of ours on the host.
func removeLocal() error {
	list, err := kernel.LocalAddrs(nil, overlay.Protocol)
	errs := []error{err}
	for _, a := range list {
		errs = append(errs, kernel.DropLocal(nil, a, overlay.Protocol))
	}
	return errors.Join(errs...)
}

// removePolicies removes the rules that vxlan-policy-agent leaves when it stops. While a container lives, or the agent, they stay: without them the containers
// of this host would be open to each other.
func removePolicies(ctx context.Context, cfg Config, records *endpoint.Dir, log *slog.Logger) error {
	if c := (attachments{records, cfg.Datastore}).count(ctx); c.Live > 0 {
		log.Warn("policy table stays: containers are attached", "table", nft.Name)
		return nil
	}
	err := nft.Remove(nil)
	if errors.Is(err, fault.Conflict) {
		log.Warn("policy table stays: vxlan-policy-agent is running", "table", nft.Name)
		return nil
	}
	return err
}

// removeRecords removes the endpoint directory, with the records of containers that are gone. While one lives it stays.
func removeRecords(ctx context.Context, cfg Config, records *endpoint.Dir) error {
	if c := (attachments{records: records}).count(ctx); c.Live > 0 {
		return nil
	}
	good, bad, err := records.List()
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range good {
		errs = append(errs, records.Detach(ctx, r.Key, nil, nil))
	}
	for _, b := range bad {
		errs = append(errs, records.Detach(ctx, b.Key, nil, nil))
	}
	_, err = records.RemoveOrphans(ctx)
	errs = append(errs, err)
	files, err := os.ReadDir(cfg.EndpointDir)
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	for _, f := range files {
		if f.Name()[0] != '.' {
			return fault.Conflictf("%s holds %s, which is no record of ours", cfg.EndpointDir, f.Name())
		}
	}
	for _, f := range files {
		if err := os.RemoveAll(filepath.Join(cfg.EndpointDir, f.Name())); err != nil {
			return err
		}
	}
	return os.Remove(cfg.EndpointDir)
}
