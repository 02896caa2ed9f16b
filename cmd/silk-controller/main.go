// Command silk-controller gives hosts their overlay subnets: the lease API over a database.
package main

import (
	"flag"

	"code.cloudfoundry.org/silk/controller"
	"code.cloudfoundry.org/silk/internal/service"
)

func main() {
	file := flag.String("config", "", "path of the configuration file (JSON)")
	epoch := flag.Bool("renew-epoch", false, "after the database was restored from a copy: tell daemons so, then exit")
	flag.Parse()
	cfg, err := controller.Load(*file)
	if err != nil {
		service.Exit("silk-controller", err)
	}
	level, _ := service.ParseLevel(cfg.LogLevel)
	log, v := service.Logger("silk-controller", level)
	cfg.Level = v
	ctx, _ := service.Signals()
	run := controller.Run
	if *epoch {
		run = controller.RenewEpoch
	}
	service.Exit("silk-controller", run(ctx, cfg, log))
}
