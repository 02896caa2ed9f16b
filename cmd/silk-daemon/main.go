// Command silk-daemon keeps the host's lease and the paths to its peers. See docs/operate/daemon.md.
package main

import (
	"flag"

	"code.cloudfoundry.org/silk/daemon"
	"code.cloudfoundry.org/silk/internal/service"
)

func main() {
	path := flag.String("config", "/etc/silk/daemon.json", "configuration `file`")
	flag.Parse()
	ctx, stop := service.Signals()
	defer stop()
	cfg, warnings, err := daemon.Load(*path)
	if err != nil {
		service.Exit("silk-daemon", err)
	}
	start, _ := service.ParseLevel(cfg.LogLevel)
	log, level := service.Logger("silk-daemon", start)
	for _, w := range warnings {
		log.Warn("configuration", "warning", w)
	}
	service.Exit("silk-daemon", daemon.Run(ctx, cfg, level, log))
}
