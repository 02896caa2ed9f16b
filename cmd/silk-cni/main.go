// Command silk-cni is a plugin of the Container Network Interface: a container runtime runs it to attach a container to the
// overlay. See package cni.
package main

import (
	"context"
	"os"

	"code.cloudfoundry.org/silk/cni"
)

func main() { os.Exit(cni.Run(context.Background(), cni.OS())) }
