// Command silk-tls ends TLS for the containers of its host. See docs/operate/tls.md.
package main

import (
	"flag"

	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/tlsproxy"
)

func main() {
	path := flag.String("config-file", "/etc/silk/tls.json", "configuration `file`")
	flag.Parse()
	ctx, stop := service.Signals()
	defer stop()
	cfg, warnings, err := tlsproxy.Load(*path)
	if err != nil {
		service.Exit("silk-tls", err)
	}
	start, _ := service.ParseLevel(cfg.LogLevel)
	log, level := service.Logger("silk-tls", start)
	for _, w := range warnings {
		log.Warn("configuration", "warning", w)
	}
	service.Exit("silk-tls", tlsproxy.Run(ctx, cfg, level, log))
}
