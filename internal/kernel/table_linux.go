package kernel

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// HasTable reports whether ns, nil for the calling thread's namespace, has the nft table "inet name".
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
	return true, nil
}
