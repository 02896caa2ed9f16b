// Command silk is Silk's command line: lab, status, leases, version.
package main

import (
	"os"

	"code.cloudfoundry.org/silk/cli"
	"code.cloudfoundry.org/silk/internal/service"
)

func main() {
	ctx, stop := service.Signals()
	defer stop()
	os.Exit(cli.Run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
