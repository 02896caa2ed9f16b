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
	"code.cloudfoundry.org/silk/bench/dnsbench"
	"code.cloudfoundry.org/silk/bench/firewall"
	"code.cloudfoundry.org/silk/bench/leasebench"
	"code.cloudfoundry.org/silk/bench/overlay"
	"code.cloudfoundry.org/silk/bench/policybench"
	"code.cloudfoundry.org/silk/bench/tlsbench"
)

type room struct {
	name string
	run  func(context.Context, *bench.Report) error
}

// rooms lists what can be measured, in order.
var rooms = []room{
	{"lease", leasebench.Run},
	{"overlay", overlay.Run},
	{"daemon", daemon.Run},
	{"cni", cni.Run},
	{"policy", policybench.Run},
	{"firewall", firewall.Run},
	{"dns", dnsbench.Run},
	{"tls", tlsbench.Run},
}

func main() {
	if overlay.Hold() || policybench.Fleet() || firewall.Child() || dnsbench.Child() || tlsbench.Child() {
		return
	}
	only := flag.String("only", "", "comma list of rooms to measure (default all)")
	out := flag.String("out", "bench/out/results.json", "file for the results")
	flag.Parse()
	chosen, err := choose(*only)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	var report bench.Report
	failed := false
	for _, r := range chosen {
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

// choose returns the rooms of a comma list, in their own order, all for "".
func choose(list string) ([]room, error) {
	if list == "" {
		return rooms, nil
	}
	names := strings.Split(list, ",")
	var known []string
	var chosen []room
	for _, r := range rooms {
		known = append(known, r.name)
		if slices.Contains(names, r.name) {
			chosen = append(chosen, r)
		}
	}
	for _, n := range names {
		if !slices.Contains(known, n) {
			return nil, fmt.Errorf("no room %q can be measured: expected some of %s", n, strings.Join(known, ","))
		}
	}
	return chosen, nil
}
