package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// HasTable reports whether ns, nil for the calling thread's namespace, has the nft table "inet name" and the table does something: it
// has chains or other objects, and is not dormant.
func HasTable(ns *NS, name string) (bool, error) {
	c, err := DialNetfilter(ns)
	if err != nil {
		return false, err
	}
	defer c.Close()
	var b Batch
	b.Add(NFTables(unix.NFT_MSG_GETTABLE), 0, NFGen(unix.NFPROTO_INET))
	b.String(unix.NFTA_TABLE_NAME, name)
	a, err := c.Query(&b)
	if err == nil && a[0].Err != nil {
		err = a[0].Err
	}
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look up nft table inet %s: %w", name, err)
	}
	used, dormant := false, false
	for t, v := range Attrs(a[0].Body[min(4, len(a[0].Body)):]) { // after a nfgenmsg
		switch {
		case len(v) != 4:
		case t == unix.NFTA_TABLE_USE:
			used = binary.BigEndian.Uint32(v) > 0
		case t == unix.NFTA_TABLE_FLAGS:
			dormant = binary.BigEndian.Uint32(v)&unix.NFT_TABLE_F_DORMANT != 0
		}
	}
	return used && !dormant, nil
}
