// Command policy-server keeps network policies: an API for people, and one for the agents of hosts. See docs/operate/policy-server.md.
package main

import (
	"flag"
	"os"

	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policyserver"
)

func main() {
	args := append(os.Args[1:], "")
	flags := flag.NewFlagSet("policy-server [import]", flag.ExitOnError)
	o := policyserver.Options{Import: args[0] == "import"}
	if o.Import {
		args = args[1:]
		flags.StringVar(&o.From, "from", "", "configuration `file` of the policy-server to take over (default: its tables are beside ours)")
	}
	file := flags.String("config-file", "", "path of the configuration `file` (JSON)")
	flags.BoolVar(&o.RenewEpoch, "renew-epoch", false, "after the database was restored from a copy: tell agents so, then exit")
	flags.Parse(args[:len(args)-1])
	cfg, err := policyserver.Load(*file)
	if err != nil {
		service.Exit("policy-server", err)
	}
	ctx, _ := service.Signals()
	service.Exit("policy-server", policyserver.Main(ctx, cfg, o))
}
