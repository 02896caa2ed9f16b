// Command silk-dns answers what containers are called, by DNS and over HTTP. See docs/operate/dns.md.
package main

import (
	"flag"
	"os"

	"code.cloudfoundry.org/silk/dns"
	"code.cloudfoundry.org/silk/internal/service"
)

func main() {
	var path string
	flag.StringVar(&path, "config", "/etc/silk/dns.json", "configuration `file`")
	flag.StringVar(&path, "c", "/etc/silk/dns.json", "configuration `file`, as the deployed programs call it")
	flag.Parse()
	ctx, stop := service.Signals()
	defer stop()
	cfg, err := dns.Load(path)
	start, _ := service.ParseLevel(cfg.LogLevel)
	log, level := service.Logger("silk-dns", start)
	if err != nil {
		log.Error("could not read config file", "error", err)
		os.Exit(2)
	}
	service.Exit("silk-dns", dns.Run(ctx, cfg, level, log))
}
