// Command policy-server keeps network policies: an API for people, and one for the agents of hosts. See docs/operate/policy-server.md.
package main

import (
	"flag"
	"os"

	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/policyserver"
)

func main() {
	args, flags, o := os.Args[1:], flag.NewFlagSet("policy-server [import]", flag.ExitOnError), policyserver.Options{}
	file := flags.String("config-file", "", "path of the configuration `file` (JSON)")
	flags.BoolVar(&o.RenewEpoch, "renew-epoch", false, "after the database was restored from a copy: tell agents so, then exit")
	if o.Import = len(args) > 0 && args[0] == "import"; o.Import {
		args = args[1:]
		flags.StringVar(&o.From, "from", "", "configuration `file` of the policy-server to take over (default: its tables are beside ours)")
	}
	if flags.Parse(args); flags.NArg() > 0 { // "import" at the end would otherwise start a server
		flags.Usage()
		os.Exit(2)
	}
	cfg, err := policyserver.Load(*file)
	if err == nil {
		ctx, _ := service.Signals()
		err = policyserver.Main(ctx, cfg, o)
	}
	service.Exit("policy-server", err)
}
