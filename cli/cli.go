// Package cli is the command silk: what people type. Each subcommand is a thin layer over the package that does the work, and
// says on failure what to do next.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// exitCode ends silk with a status of its own: that of a command which it ran.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// Run carries out the command line args (without the program's name) and returns the exit status.
func Run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := &cobra.Command{
		Use: "silk", Short: "Silk gives every container an address on one flat network, across hosts.",
		SilenceUsage: true, SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(versionCommand(), labCommand(), statusCommand(), leasesCommand(), endpointCommand(), policyCommand(), asgCommand(), flowsCommand(), caCommand())
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var code exitCode
	if errors.As(err, &code) {
		return int(code)
	}
	fmt.Fprintln(stderr, "silk:", err)
	return 1
}

func versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the version of this binary", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		info, ok := debug.ReadBuildInfo()
		if !ok {
			return errors.New("this binary carries no build information")
		}
		version, revision := info.Main.Version, ""
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				revision = " " + s.Value
			}
		}
		_, err := fmt.Fprintf(c.OutOrStdout(), "silk %s%s %s\n", version, revision, info.GoVersion)
		return err
	}}
}
