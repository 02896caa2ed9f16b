package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/httpjson"
	"code.cloudfoundry.org/silk/internal/service"
	"code.cloudfoundry.org/silk/lease"
	"code.cloudfoundry.org/silk/lease/leasehttp"
	"github.com/spf13/cobra"
)

// hostNetwork is what silk-daemon tells its host on /v1/network.
type hostNetwork struct {
	OverlaySubnet  string `json:"overlay_subnet"`
	OverlayNetwork string `json:"overlay_network"`
	MTU            int    `json:"mtu"`
	VTEP           string `json:"vtep"`
	Status         string `json:"status"`
	Reason         string `json:"reason"`
}

func statusCommand() *cobra.Command {
	var port int
	c := &cobra.Command{Use: "status", Short: "Show how this host stands: its lease and whether the overlay is as it should be", Args: cobra.NoArgs}
	c.Flags().IntVar(&port, "port", 23954, "health_check_port of the host's silk-daemon")
	c.RunE = func(c *cobra.Command, _ []string) error {
		base := fmt.Sprintf("http://127.0.0.1:%d", port)
		api := httpjson.Client{Base: base, HTTP: &http.Client{Timeout: 5 * time.Second}, Limit: 1 << 20}
		var n hostNetwork
		if err := api.Do(c.Context(), http.MethodGet, "/v1/network", nil, &n); err != nil {
			return fmt.Errorf("ask silk-daemon on this host: %w: is it running, and is %d its health_check_port?", err, port)
		}
		t := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintf(t, "state\t%s\n", strings.Join(nonEmpty(n.Status, n.Reason), ": "))
		fmt.Fprintf(t, "lease\t%s\n", strings.Join(nonEmpty(n.OverlaySubnet, "none")[:1], ""))
		fmt.Fprintf(t, "overlay\t%s\n", n.OverlayNetwork)
		if n.VTEP != "" {
			fmt.Fprintf(t, "device\t%s, containers have MTU %d\n", n.VTEP, n.MTU)
		}
		if err := t.Flush(); err != nil {
			return err
		}
		if n.Status != "ready" {
			return exitCode(2)
		}
		return nil
	}
	c.Long = c.Short + "\n\nThe exit status is 0 when it is ready, 2 when it is anything else, 1 when the daemon does not answer."
	return c
}

func nonEmpty(s ...string) []string {
	return slices.DeleteFunc(s, func(x string) bool { return x == "" })
}

// controllerAccess is how a host reaches the controller: the keys of silk-daemon's configuration, of which others are ignored.
type controllerAccess struct {
	URL  string `json:"connectivity_server_url"`
	CA   string `json:"ca_cert_file"`
	Cert string `json:"client_cert_file"`
	Key  string `json:"client_key_file"`
}

func leasesCommand() *cobra.Command {
	var file string
	var given controllerAccess
	c := &cobra.Command{Use: "leases", Short: "List the leases that the controller has given", Args: cobra.NoArgs}
	c.Flags().StringVar(&file, "config", "/etc/silk/daemon.json", "silk-daemon's configuration, for the controller's address and certificates")
	c.Flags().StringVar(&given.URL, "url", "", "the controller, instead of the configuration's")
	c.Flags().StringVar(&given.CA, "ca", "", "CA certificate, likewise")
	c.Flags().StringVar(&given.Cert, "cert", "", "client certificate, likewise")
	c.Flags().StringVar(&given.Key, "key", "", "client key, likewise")
	c.RunE = func(c *cobra.Command, _ []string) error {
		access, err := given.over(file)
		if err != nil {
			return err
		}
		tc, err := service.Certificates{CA: access.CA, Cert: access.Cert, Key: access.Key}.Client()
		if err != nil {
			return err
		}
		client := leasehttp.NewClient(access.URL, tc, leasehttp.ClientOptions{})
		defer client.Close()
		leases, err := client.Leases(c.Context())
		if err != nil {
			return err
		}
		slices.SortFunc(leases, func(a, b lease.Lease) int { return compare(a.Subnet, b.Subnet) })
		t := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "SUBNET\tHOST\tVTEP")
		for _, l := range leases {
			fmt.Fprintf(t, "%v\t%v\t%v\n", l.Subnet, l.Underlay, l.MAC)
		}
		return t.Flush()
	}
	return c
}

func compare(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// over returns a with what it leaves empty taken from the file, which is read only if something is.
func (a controllerAccess) over(file string) (controllerAccess, error) {
	if a.URL != "" && a.CA != "" && a.Cert != "" && a.Key != "" {
		return a, nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return a, fmt.Errorf("read silk-daemon's configuration: %w: name it with --config, or give --url, --ca, --cert and --key", err)
	}
	var c controllerAccess
	if err := json.Unmarshal(b, &c); err != nil {
		return a, fault.Invalidf("configuration %s: %w", file, err)
	}
	for _, f := range []struct{ to, from *string }{{&a.URL, &c.URL}, {&a.CA, &c.CA}, {&a.Cert, &c.Cert}, {&a.Key, &c.Key}} {
		if *f.to == "" {
			*f.to = *f.from
		}
	}
	return a, nil
}
