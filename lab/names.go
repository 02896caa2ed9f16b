package lab

import (
	"code.cloudfoundry.org/silk/authority"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/registration"
)

// What a lab with names has besides: a registry beside the controller, and on every host a resolver for its containers and a proxy that ends TLS for them.
// A container is found as GROUP.apps.internal with the others of its group, as INDEX.GROUP.apps.internal and as NAME.apps.internal.
const (
	Domain     = "apps.internal" // in which the names are
	TLSPort    = 61443           // of every container: ends TLS in front of HTTPPort
	MutualPort = 61444           // the same for clients that show a container's certificate

	ContainerRoot = "/run/container-ca.crt" // on every host: what its silk-tls says that containers are to trust

	// cold is how silk-dns calls itself until it has heard so long that it denies what it does not know.
	cold = "cold"

	roleNATS      = "nats-server"
	natsPort      = 4222
	natsUser      = "silk-dns"
	resolverDebug = 8056 // of silk-dns
	proxyDebug    = 8057 // of silk-tls
	trustDomain   = "silk.internal"
	labInterval   = 2  // seconds between two times that a host tells of its containers: those of labs come and go
	labStaleness  = 30 // seconds after which names go that nobody tells of any more
)

// resolverAddress is where silk-dns answers containers, on every host.
var resolverAddress = netip.MustParseAddr("169.254.0.2")

// namePrograms are the programs of a lab with names, on every host.
var namePrograms = []string{"silk-dns", "silk-tls"}

// findNATS returns the path of nats-server, which is none of Silk's: beside Silk's programs, or where this machine has it.
func findNATS(programs string) (string, error) {
	path, err := lookPath(roleNATS, environ("", "", programs))
	if err != nil {
		return "", fault.NotFoundf("containers' names are told through nats-server, which this machine lacks: install the package nats-server (apt-get install nats-server), or leave out --names")
	}
	return path, nil
}

// named reports whether the lab's containers have names.
func (s *supervisor) named() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.j.NATS != ""
}

// secret returns a text that only this lab knows, made now if there is none. Who asks first, of nodes that are being built at once, decides.
func (s *supervisor) secret(name string) (string, error) {
	s.secrets.Lock()
	defer s.secrets.Unlock()
	path := filepath.Join(s.dir, name)
	b, err := os.ReadFile(path)
	if err == nil && len(b) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist) {
		return string(b), err
	}
	text := rand.Text()
	return text, writeFile(path, []byte(text))
}

// writeNATS writes the configuration of the registry. Who has a certificate of the lab and the password may say and hear names, and nothing else.
func (n *node) writeNATS(cert, key string) error {
	password, err := n.s.secret("nats-password")
	if err != nil {
		return err
	}
	subjects := []string{registration.SubjectRegister, registration.SubjectUnregister, registration.SubjectGreet, registration.SubjectStart, "_INBOX.>"}
	return writeJSON(filepath.Join(n.dir(), "nats.conf"), map[string]any{ // its language has JSON in it
		"server_name": n.s.name(), "listen": netip.AddrPortFrom(address(0), natsPort).String(),
		"tls": map[string]any{"cert_file": cert, "key_file": key, "ca_file": n.s.ca.CertFile(), "verify": true, "timeout": 5},
		"authorization": map[string]any{"users": []any{map[string]any{"user": natsUser, "password": password,
			"permissions": map[string]any{"publish": subjects, "subscribe": subjects}}}},
	})
}

// writeResolverConfig writes the configuration of a host's silk-dns.
func (n *node) writeResolverConfig(cert, key string) error {
	password, err := n.s.secret("nats-password")
	if err != nil {
		return err
	}
	return writeJSON(filepath.Join(n.dir(), "dns.json"), map[string]any{
		"domains": []string{Domain}, "listen_dns": []string{netip.AddrPortFrom(resolverAddress, 53).String()}, "state_dir": filepath.Join(n.dir(), "dns-state"),
		"staleness_threshold_seconds": labStaleness, "resume_pruning_delay_seconds": labInterval, "warm_duration_seconds": labInterval, "pruning_interval_seconds": labInterval, "advertise_interval_seconds": labInterval,
		"address_ranges": []string{Overlay.String()}, "endpoint_dir": "/run/silk/endpoints", "debug_server_port": resolverDebug,
		"nats": map[string]any{
			"hosts": []any{map[string]any{"hostname": address(0).String(), "port": natsPort}}, "user": natsUser, "pass": password,
			"tls_enabled": true, "ca_certs": n.s.ca.CertFile(), "cert_chain": cert, "private_key": key,
		},
	})
}

// writeProxyConfig writes the configuration of a host's silk-tls.
func (n *node) writeProxyConfig(tls map[string]any) error {
	groups := map[string]any{} // the default: the host's policy agent tells them
	if !n.s.policed() {
		groups["policy_agent"] = "" // nobody knows of groups
	}
	return writeJSON(filepath.Join(n.dir(), "tls.json"), tls, groups, map[string]any{
		"endpoint_dir": "/run/silk/endpoints", "certificates": "authority", "underlay_ip": address(n.index).String(),
		"connectivity_server_url": fmt.Sprintf("https://%v:%d", address(0), controllerPort), "names_url": fmt.Sprintf("http://127.0.0.1:%d", resolverDebug),
		"max_connections": 1024, "state_dir": n.proxyState(), "debug_server_port": proxyDebug,
	})
}

// nameKeys are the network configuration's of a host with names. Containers of the lab's own say with CNI_ARGS who they are; others have the name of
// their group alone.
func nameKeys(own bool) map[string]any {
	advertise := map[string]any{"domain": Domain, "group": true, "port": HTTPPort}
	if own {
		advertise["names"], advertise["index"] = []string{"${args.NAME}"}, "${args.INDEX}"
	}
	return map[string]any{
		"advertise": advertise,
		"tls":       []any{map[string]any{}, map[string]any{"listen": MutualPort, "client_auth": true}},
		"dns":       map[string]any{"nameservers": []string{resolverAddress.String()}, "options": []string{"timeout:1", "attempts:5"}},
	}
}

// nameArgs are the CNI_ARGS of a container.
func (c containerEntry) nameArgs() [][2]string {
	return [][2]string{{"NAME", c.Name}, {"INDEX", strconv.Itoa(c.Index)}}
}

// checkGroup refuses what no group can be called, and in a lab with names what no name can be made of.
func (j *journal) checkGroup(group string) error {
	if err := checkGroup(group); err != nil || j.NATS == "" {
		return err
	}
	if _, err := registration.ParseName("0." + group + "." + Domain); err != nil {
		return fault.Invalidf("group %q has no name in this lab: %w", group, err)
	}
	return nil
}

// names returns what the container is to be called, its instance name aside.
func (c Container) names() []string {
	all := []string{c.Group + "." + Domain, c.Name + "." + Domain}
	slices.Sort(all)
	return slices.Compact(all)
}

// freeIndexOf returns the lowest number that no container of the group has.
func (j *journal) freeIndexOf(group string) int {
	for i := 0; ; i++ {
		if !slices.ContainsFunc(j.Containers, func(c containerEntry) bool { return c.Group == group && c.Index == i }) {
			return i
		}
	}
}

func (s *supervisor) natsPath() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.j.NATS
}

// name returns the lab's name.
func (s *supervisor) name() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.j.Name
}

// Name is a name of containers.
type Name struct {
	Name      string       `json:"name"`
	Addresses []netip.Addr `json:"addresses"`         // of the containers that are to have it
	Missing   []string     `json:"missing,omitempty"` // hosts whose silk-dns does not know it, or not for all of these addresses
}

// known returns the names that the attached containers are to have, and which host's silk-dns does not know them.
func (s *supervisor) known(ctx context.Context, hosts []hostEntry, containers []Container) []Name {
	byName, addresses := map[string][]netip.Addr{}, []netip.Addr{}
	for _, c := range containers {
		if c.Address.IsValid() && !c.Leaving {
			addresses = append(addresses, c.Address)
			for _, name := range c.names() {
				byName[name] = append(byName[name], c.Address)
			}
		}
	}
	told := make([]map[netip.Addr][]string, len(hosts))
	var wg sync.WaitGroup
	for i, h := range hosts {
		wg.Go(func() {
			if n, err := s.node(h.Name); err == nil {
				told[i] = n.namesOf(ctx, addresses)
			}
		})
	}
	wg.Wait()
	all := []Name{}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		n := Name{Name: name, Addresses: byName[name]}
		for i, h := range hosts {
			if slices.ContainsFunc(n.Addresses, func(a netip.Addr) bool { return !slices.Contains(told[i][a], name) }) {
				n.Missing = append(n.Missing, h.Name)
			}
		}
		all = append(all, n)
	}
	return all
}

// namesOf returns what the host's silk-dns calls the addresses, nothing when it does not answer.
func (n *node) namesOf(ctx context.Context, addresses []netip.Addr) map[netip.Addr][]string {
	names := map[netip.Addr][]string{}
	for some := range slices.Chunk(addresses, 100) {
		q := url.Values{}
		for _, a := range some {
			q.Add("address", a.String())
		}
		var answer struct {
			Names map[netip.Addr][]string `json:"names"`
		}
		if err := n.ask(ctx, resolverDebug, "/v1/names?"+q.Encode(), &answer); err != nil {
			return nil
		}
		maps.Copy(names, answer.Names)
	}
	return names
}

// awaitForgotten gives silk-dns a moment to say everywhere that the host's containers have gone: hosts whose programs are stopped have stood empty for longer
// than those of a lab. What is not said grows stale.
func (n *node) awaitForgotten(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	n.s.mu.Lock()
	hosts := slices.Collect(maps.Values(n.s.nodes))
	n.s.mu.Unlock()
	poll(ctx, func() (bool, error) {
		for _, h := range hosts {
			if len(h.namesOf(ctx, n.detached)) > 0 {
				return false, nil
			}
		}
		return true, nil
	})
}

// makeContainerCA makes the authority that containers' certificates go back to, unless it is there.
func (s *supervisor) makeContainerCA() error {
	if _, err := os.Stat(s.containerRoot()); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	cert, key, err := authority.NewRoot("silk lab "+s.name()+" containers", 10*365*24*time.Hour, time.Now())
	if err != nil {
		return fmt.Errorf("make the authority of containers: %w", err)
	}
	return errors.Join(writeFile(s.containerKey(), key), writeFile(s.containerRoot(), cert)) // with the certificate it counts as made
}

func (s *supervisor) containerRoot() string { return filepath.Join(s.dir, "container-ca.crt") }
func (s *supervisor) containerKey() string  { return filepath.Join(s.dir, "container-ca.key") }

// caKeys are the controller's about that authority.
func (s *supervisor) caKeys() map[string]any {
	return map[string]any{
		"container_ca_cert_file": s.containerRoot(), "container_ca_key_file": s.containerKey(),
		"container_ca_domains": []string{Domain}, "container_ca_trust_domain": trustDomain,
	}
}

// showRoots puts the authorities that silk-tls has heard of where containers of the host find them. It is called on the host.
func (n *node) showRoots() error {
	err := os.Symlink(filepath.Join(n.proxyState(), "roots/roots.pem"), ContainerRoot)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}

func (n *node) proxyState() string { return filepath.Join(n.dir(), "tls-state") }
