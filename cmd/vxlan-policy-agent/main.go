// Command vxlan-policy-agent makes policies hold on its host. See docs/operate/policy-agent.md.
package main

import (
	"flag"

	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policyagent"
)

func main() {
	path := flag.String("config-file", "/etc/silk/policy-agent.json", "configuration `file`")
	keep := flag.Bool("keep-established", false, "let connections go on that no policy allows any more")
	flag.Parse()
	ctx, stop := service.Signals()
	defer stop()
	cfg, warnings, err := policyagent.Load(*path)
	if err != nil {
		service.Exit("vxlan-policy-agent", err)
	}
	cfg.KeepEstablished = cfg.KeepEstablished || *keep
	start, _ := service.ParseLevel(cfg.LogLevel)
	log, level := service.Logger("vxlan-policy-agent", start)
	for _, w := range warnings {
		log.Warn("configuration", "warning", w)
	}
	service.Exit("vxlan-policy-agent", policyagent.Run(ctx, cfg, level, log))
}
