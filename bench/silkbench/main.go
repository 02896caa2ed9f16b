// Command silkbench runs the benchmarks of all rooms, or of those named with -only, prints a table and writes
// bench/out/results.json. It exits with 1 when a bar does not hold.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/bench/cni"
	"code.cloudfoundry.org/silk/bench/daemon"
	"code.cloudfoundry.org/silk/bench/leasebench"
	"code.cloudfoundry.org/silk/bench/overlay"
)

// rooms lists what can be measured, in order.
var rooms = []struct {
	name string
	run  func(context.Context, *bench.Report) error
}{
	{"lease", leasebench.Run},
	{"overlay", overlay.Run},
	{"daemon", daemon.Run},
	{"cni", cni.Run},
}

func main() {
	if overlay.Hold() {
		return
	}
	only := flag.String("only", "", "comma list of rooms to measure (default all)")
	out := flag.String("out", "bench/out/results.json", "file for the results")
	flag.Parse()
	var report bench.Report
	failed := false
	for _, r := range rooms {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), r.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "measuring %s\n", r.name)
		if err := r.run(context.Background(), &report); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", r.name, err)
			failed = true
		}
	}
	if err := report.Table(os.Stdout); err != nil {
		failed = true
	}
	if err := report.Save(*out); err != nil {
		fmt.Fprintln(os.Stderr, err)
		failed = true
	}
	for _, x := range report.Results {
		failed = failed || x.Holds != nil && !*x.Holds
	}
	if failed {
		os.Exit(1)
	}
}
