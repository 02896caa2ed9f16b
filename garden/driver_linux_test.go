package garden_test

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
)

const driverArg = "garden-driver"

func driverMain(args []string) int {
	fmt.Println(args)
	return 1
}

// sleeper is a container's first process.
func sleeper() *exec.Cmd { return exec.Command("sleep", "3600") }

func kernelUnbind(path string) { kernel.UnbindNS(path) }

func read(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
