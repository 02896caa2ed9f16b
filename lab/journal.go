package lab

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"code.cloudfoundry.org/silk/fault"
)

const (
	journalFile    = "lab.json"
	journalVersion = 1
)

// journal is what is wanted of a lab. It is the supervisor's to write; commands ask it.
type journal struct {
	Version    int              `json:"version"`
	Name       string           `json:"name"`
	Programs   string           `json:"programs"`
	BridgeNF   bool             `json:"bridge_nf,omitempty"`
	Policy     Policy           `json:"policy,omitempty"` // empty as PolicyNone: labs of earlier versions
	Outside    bool             `json:"outside,omitempty"`
	NATS       string           `json:"nats,omitempty"` // path of nats-server; empty: containers have no names
	Hosts      []hostEntry      `json:"hosts"`
	Containers []containerEntry `json:"containers"`
}

// hostEntry is one wanted host. Index, from 1, decides its underlay address and is not used twice at a time.
type hostEntry struct {
	Name        string `json:"name"`
	Index       int    `json:"index"`
	Partitioned bool   `json:"partitioned,omitempty"`
	Leaving     bool   `json:"leaving,omitempty"` // on its way out: containers first, then silk-teardown, then the host
}

// containerEntry is one wanted container.
type containerEntry struct {
	Name    string `json:"name"`
	Host    string `json:"host"`
	Group   string `json:"group,omitempty"` // policy group
	Index   int    `json:"index,omitempty"` // of the instance, among the containers of its group
	Ports   []Port `json:"ports,omitempty"`
	Leaving bool   `json:"leaving,omitempty"`
}

// newJournal returns host1 to hostN with c1 to cM spread over them in order, web and api by turns.
func newJournal(o Options) *journal {
	j := &journal{Version: journalVersion, Name: o.Name, Programs: o.Programs, BridgeNF: o.BridgeNF, Policy: o.Policy, Outside: o.Outside, NATS: o.nats, Hosts: []hostEntry{}, Containers: []containerEntry{}}
	for i := range o.Hosts {
		h := fmt.Sprintf("host%d", i+1)
		j.Hosts = append(j.Hosts, hostEntry{Name: h, Index: i + 1})
		for range o.Containers {
			n := len(j.Containers)
			j.Containers = append(j.Containers, containerEntry{Name: fmt.Sprintf("c%d", n+1), Host: h, Group: groups[n%len(groups)], Index: n / len(groups)})
		}
	}
	return j
}

func readJournal(dir string) (*journal, error) {
	b, err := os.ReadFile(filepath.Join(dir, journalFile))
	if err != nil {
		return nil, err
	}
	return parseJournal(b)
}

// parseJournal refuses, as fault.Invalid, what no supervisor wrote.
func parseJournal(b []byte) (*journal, error) {
	var j journal
	if err := json.Unmarshal(b, &j); err != nil {
		return nil, fault.Invalidf("read the lab's journal: %w", err)
	}
	if j.Version != journalVersion {
		return nil, fault.Invalidf("the lab was made by another version of silk (journal %d, expected %d): take it down with that one", j.Version, journalVersion)
	}
	seen, indexes := map[string]bool{}, map[int]bool{}
	for _, h := range j.Hosts {
		if checkName(h.Name) != nil || seen[h.Name] || h.Index < 1 || h.Index > MaxHosts || indexes[h.Index] {
			return nil, fault.Invalidf("the lab's journal is damaged: host %q, index %d", h.Name, h.Index)
		}
		seen[h.Name], indexes[h.Index] = true, true
	}
	for _, c := range j.Containers {
		if checkName(c.Name) != nil || seen[c.Name] || j.host(c.Host) == nil || c.Group != "" && checkGroup(c.Group) != nil || c.Index < 0 {
			return nil, fault.Invalidf("the lab's journal is damaged: container %q on %q", c.Name, c.Host)
		}
		seen[c.Name] = true
	}
	return &j, nil
}

// save replaces the file at once and whole.
func (j *journal) save(dir string) error {
	b, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, journalFile), append(b, '\n'))
}

// writeFile replaces a file atomically. It does not sync: a lab does not outlive its machine.
func writeFile(path string, b []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

func (j *journal) host(name string) *hostEntry {
	if i := slices.IndexFunc(j.Hosts, func(h hostEntry) bool { return h.Name == name }); i >= 0 {
		return &j.Hosts[i]
	}
	return nil
}

func (j *journal) container(name string) *containerEntry {
	if i := slices.IndexFunc(j.Containers, func(c containerEntry) bool { return c.Name == name }); i >= 0 {
		return &j.Containers[i]
	}
	return nil
}

// free reports, as fault.Conflict, that a name is in use.
func (j *journal) free(name string) error {
	if j.host(name) != nil || j.container(name) != nil {
		return fault.Conflictf("%q exists already", name)
	}
	return nil
}

// freeIndex returns the lowest index that no host has.
func (j *journal) freeIndex() (int, error) {
	for i := 1; i <= MaxHosts; i++ {
		if !slices.ContainsFunc(j.Hosts, func(h hostEntry) bool { return h.Index == i }) {
			return i, nil
		}
	}
	return 0, fault.Exhaustedf("the lab has %d hosts: no more fit", MaxHosts)
}

// address returns the underlay address of a host: 10.0.0.11 for index 1. The controller, index 0, has 10.0.0.10.
func address(index int) netip.Addr {
	a := underlay.Addr().As4()
	a[3] = byte(10 + index)
	return netip.AddrFrom4(a)
}
