// Command silk-teardown gives the host's lease back and removes what Silk put on the host. See docs/operate/daemon.md.
package main

import (
	"flag"

	"code.cloudfoundry.org/silk/daemon"
	"code.cloudfoundry.org/silk/internal/service"
)

func main() {
	path := flag.String("config", "/etc/silk/daemon.json", "configuration `file` of silk-daemon")
	force := flag.Bool("force", false, "go on though containers are attached, which cuts them off")
	flag.Parse()
	ctx, stop := service.Signals()
	defer stop()
	cfg, warnings, err := daemon.Load(*path)
	if err != nil {
		service.Exit("silk-teardown", err)
	}
	start, _ := service.ParseLevel(cfg.LogLevel)
	log, _ := service.Logger("silk-teardown", start)
	for _, w := range warnings {
		log.Warn("configuration", "warning", w)
	}
	service.Exit("silk-teardown", daemon.Teardown(ctx, cfg, *force, log))
}
