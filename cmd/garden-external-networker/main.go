// Command garden-external-networker is Garden's network plugin: Garden runs it to attach a container, to detach it, and to
// open ports and destinations for it. See package garden.
package main

import (
	"context"
	"os"

	"code.cloudfoundry.org/silk/garden"
)

func main() { os.Exit(garden.Run(context.Background(), garden.OS())) }
