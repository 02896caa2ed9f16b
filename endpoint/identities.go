package endpoint

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/internal/kernel"
)

// identityFile lists what the policy rules in the kernel take addresses for.
const identityFile = ".identities"

// Identity says as whom the policy rules in the kernel know an address. It may be one that its container has left behind while nobody
// was there to take it back.
type Identity struct {
	Address   netip.Addr
	Namespace kernel.NSID // of the container; zero when it is not known
	Group     string
	Says      string // see Says; "": who wrote the list did not know
}

// Says returns a digest of what decides, beside the group, what a container may reach: its metadata and the runtime's rules. It is never empty. It costs
// little, since there may be megabytes of rules on a host.
func Says(metadata, netOut json.RawMessage) string {
	table := crc32.MakeTable(crc32.Castagnoli)
	sum := crc32.Update(crc32.Checksum(metadata, table), table, netOut)
	return fmt.Sprintf("%08x%08x", sum, uint32(len(metadata)<<16^len(netOut)))
}

// Is reports whether the rules of an identity are those of an endpoint's address.
func (i Identity) Is(r Record) bool {
	return i.Address == r.Address() && i.Namespace == r.Namespace && i.Group == r.Group && (i.Says == "" || i.Says == Says(r.Metadata, r.NetOut))
}

// SetIdentities replaces the list of identities. Who changes rules writes the list before it gives an identity and after it has taken one back,
// so that the list never lacks one that the kernel has.
func (d *Dir) SetIdentities(list []Identity) error {
	list = slices.SortedFunc(slices.Values(list), func(a, b Identity) int { return a.Address.Compare(b.Address) })
	var b bytes.Buffer
	for _, i := range list {
		fmt.Fprintf(&b, "%v %d:%d %s", i.Address, i.Namespace.Dev, i.Namespace.Ino, strconv.Quote(i.Group))
		if i.Says != "" {
			b.WriteString(" " + i.Says)
		}
		b.WriteByte('\n')
	}
	if err := d.replace(identityFile, b.Bytes(), false); err != nil {
		return fmt.Errorf("write identities: %w", err)
	}
	return nil
}

// Identities returns as whom the policy rules in the kernel may know addresses, sorted by address, of which one may have several.
func (d *Dir) Identities() ([]Identity, error) {
	b, err := kernel.ReadFile(filepath.Join(d.path, identityFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read identities: %w", err)
	}
	all, err := parseIdentities(string(b))
	if err != nil {
		return nil, fmt.Errorf("read identities: %w", err)
	}
	return all, nil
}

// parseIdentities reads what SetIdentities writes.
func parseIdentities(text string) ([]Identity, error) {
	var out []Identity
	for line := range strings.Lines(text) {
		address, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		namespace, group, _ := strings.Cut(rest, " ")
		dev, ino, _ := strings.Cut(namespace, ":")
		var i Identity
		var errs [5]error
		i.Address, errs[0] = netip.ParseAddr(address)
		i.Namespace.Dev, errs[1] = strconv.ParseUint(dev, 10, 64)
		i.Namespace.Ino, errs[2] = strconv.ParseUint(ino, 10, 64)
		quoted, err := strconv.QuotedPrefix(group)
		errs[3] = err
		if err == nil {
			i.Group, errs[3] = strconv.Unquote(quoted)
		}
		rest = group[len(quoted):]
		if i.Says = strings.TrimPrefix(rest, " "); i.Says != "" && (i.Says == rest || len(i.Says) != 16 || strings.ContainsFunc(i.Says, notHex)) || rest == " " {
			errs[4] = fault.Invalidf("expected a digest of 16 hexadecimal digits after the group")
		}
		if err := errors.Join(errs[:]...); err != nil {
			return nil, fault.Invalidf("line %.80q: %w", line, err)
		}
		out = append(out, i)
	}
	return out, nil
}

func notHex(r rune) bool { return (r < '0' || r > '9') && (r < 'a' || r > 'f') }
