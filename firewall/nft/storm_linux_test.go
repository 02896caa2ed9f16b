package nft_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/internal/kernel"
	"golang.org/x/sys/unix"
)

// storm changes nftables beside the table without pause, until stop, which returns how many transactions there were.
func (h *host) storm() (stop func() int) {
	c, err := kernel.DialNetfilter(h.ns)
	if err != nil {
		h.t.Fatal(err)
	}
	end := make(chan struct{})
	var wg sync.WaitGroup
	n := 0
	wg.Go(func() {
		for {
			select {
			case <-end:
				return
			default:
			}
			var b kernel.Batch
			for _, msg := range []uint16{unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE} {
				b.Add(kernel.NFTables(msg), unix.NLM_F_CREATE, kernel.NFGen(unix.NFPROTO_INET))
				b.String(unix.NFTA_TABLE_NAME, "another")
			}
			if c.Transact(&b, 0) == nil {
				n++
			}
		}
	})
	return func() int {
		close(end)
		wg.Wait()
		c.Close()
		return n
	}
}

// TestAStormOfOthersChanges: programs that change nftables all the time keep nobody's policies from the kernel.
func TestAStormOfOthersChanges(t *testing.T) {
	for _, unowned := range []bool{true, false} {
		h := newHost(t)
		table := h.open(nft.Options{Unowned: unowned})
		few, many := compile(t, example()), compile(t, crowd())
		stop := h.storm()
		begun := time.Now()
		var worst time.Duration
		for i := range 20 {
			rs := few
			if i%4 == 3 {
				rs = many
			}
			if i%7 == 6 {
				table.Forget()
			}
			one := time.Now()
			if _, err := table.Set(context.Background(), rs); err != nil {
				t.Errorf("unowned %v, set %d: %v", unowned, i, err)
			}
			worst = max(worst, time.Since(one))
		}
		took := time.Since(begun)
		t.Logf("unowned %v: %d transactions of others in %v; the longest Set took %v", unowned, stop(), took, worst)
		set(t, table, few)
		holds(t, table, few)
	}
}
