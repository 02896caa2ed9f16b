package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// HasTable reports whether ns, nil for the calling thread's namespace, has the nft table "inet name" and the table does something: it
// has chains or other objects, is not dormant, and each of the given chains is in it and has rules.
func HasTable(ns *NS, name string, chains ...string) (bool, error) {
	c, err := DialNetfilter(ns)
	if err != nil {
		return false, err
	}
	defer c.Close()
	var b Batch
	b.Add(NFTables(unix.NFT_MSG_GETTABLE), 0, NFGen(unix.NFPROTO_INET))
	b.String(unix.NFTA_TABLE_NAME, name)
	for _, chain := range chains {
		b.Add(NFTables(unix.NFT_MSG_GETCHAIN), 0, NFGen(unix.NFPROTO_INET))
		b.String(unix.NFTA_CHAIN_TABLE, name)
		b.String(unix.NFTA_CHAIN_NAME, chain)
	}
	a, err := c.Query(&b)
	for _, x := range a {
		if err == nil && x.Err != nil { // a nil of its type is no nil error
			err = x.Err
		}
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
	for _, x := range a[1:] {
		used = used && hasRules(x.Body)
	}
	return used && !dormant, nil
}

// hasRules reports whether the chain in an answer has rules.
func hasRules(body []byte) bool {
	for t, v := range Attrs(body[min(4, len(body)):]) {
		if t == unix.NFTA_CHAIN_USE && len(v) == 4 {
			return binary.BigEndian.Uint32(v) > 0
		}
	}
	return false
}
