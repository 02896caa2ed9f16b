// The Go runtime reads a cgroup's limit of processors when it starts, and looks again while it runs: six files for a number
// that a process of a few milliseconds has no use for.
//
//go:debug containermaxprocs=0
//go:debug updatemaxprocs=0

// Command cni-wrapper-plugin is silk-cni for the configurations of the plugin of that name: a runtime runs it to attach a container to the
// overlay. See package cni.
package main

import (
	"context"
	"os"

	"code.cloudfoundry.org/silk/cni"
)

func main() { os.Exit(cni.RunWrapper(context.Background(), cni.OS())) }
