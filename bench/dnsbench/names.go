package dnsbench

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
)

// nameOf returns the i-th name.
func nameOf(i int) string { return fmt.Sprintf("app-%05d.apps.internal", i) }

// addressesOf returns its addresses, one to three.
func addressesOf(i int) []netip.Addr {
	var all []netip.Addr
	for k := range i%3 + 1 {
		n := i*3 + k
		all = append(all, netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}))
	}
	return all
}

// messages calls each with what emitters say of all containers, one message for each.
func messages(each func([]byte) error) error {
	rnd := rand.New(rand.NewPCG(1, 1))
	guid := func() string {
		return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", rnd.Uint32(), rnd.IntN(1<<16), rnd.IntN(1<<16), rnd.IntN(1<<16), rnd.Uint64N(1<<48))
	}
	for i := range names {
		group := guid()
		for k, a := range addressesOf(i) {
			err := each(fmt.Appendf(nil, `{"uris":[%q],"host":"%v","port":8080,"app":%q,"private_instance_id":%q,"private_instance_index":"%d","availability_zone":"z%d","tags":{"component":"route-emitter"}}`,
				nameOf(i), a, group, guid(), k, k+1))
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// toFile writes a file.
func toFile(path string, write func(w io.Writer)) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	write(w)
	return errors.Join(w.Flush(), f.Close())
}

// order returns the names' numbers in the order in which they are asked for.
func order() []int { return rand.New(rand.NewPCG(2, 2)).Perm(names) }

// writeQueries writes what dnsperf reads.
func writeQueries(path string) error {
	return toFile(path, func(w io.Writer) {
		for _, i := range order() {
			fmt.Fprintln(w, nameOf(i), "A")
		}
	})
}

// writeUnbound writes unbound's configuration.
func writeUnbound(path string, at netip.AddrPort, threads int) error {
	return toFile(path, func(w io.Writer) {
		fmt.Fprintf(w, `server:
  username: ""
  chroot: ""
  pidfile: ""
  do-daemonize: no
  use-syslog: no
  verbosity: 0
  interface: %v
  port: %d
  access-control: 127.0.0.0/8 allow
  do-ip6: no
  num-threads: %d
  so-reuseport: yes
  so-rcvbuf: 4m
  so-sndbuf: 4m
  module-config: "iterator"
  minimal-responses: yes
  rrset-roundrobin: yes
  edns-buffer-size: 1232
  local-zone: "apps.internal." static
`, at.Addr(), at.Port(), threads)
		for i := range names {
			for _, a := range addressesOf(i) {
				fmt.Fprintf(w, "  local-data: \"%s. 0 IN A %v\"\n", nameOf(i), a)
			}
		}
		fmt.Fprint(w, "remote-control:\n  control-enable: no\n")
	})
}
