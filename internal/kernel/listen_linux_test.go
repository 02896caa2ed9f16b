package kernel_test

import (
	"errors"
	"os"
	"testing"

	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"golang.org/x/sys/unix"
)

func listen(t *testing.T, ns *kernel.NS, protocol, group int) *kernel.Listener {
	t.Helper()
	l, err := kernel.Listen(ns, protocol, group)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func do(t *testing.T, c *kernel.Conn, b *kernel.Batch) {
	t.Helper()
	if refused, err := c.Do(b); err != nil || refused != nil {
		t.Fatal(refused, err)
	}
}

func TestPollReadsWhatWasHeardAndDoesNotBlock(t *testing.T) {
	ns := netns.New(t)
	l, c := listen(t, ns, unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_IFADDR), dial(t, ns)
	heard := map[uint32]int{} // by who caused it
	poll := func() {
		t.Helper()
		clear(heard)
		if err := l.Poll(func(m kernel.Message) { heard[m.Port]++ }); err != nil {
			t.Fatal(err)
		}
	}
	poll()
	if len(heard) != 0 {
		t.Errorf("heard %v before anything happened", heard)
	}
	var b kernel.Batch
	for i := range 3 {
		b.Add(unix.RTM_NEWADDR, unix.NLM_F_CREATE, kernel.IfAddr(1, 32, 0))
		b.Attr(unix.IFA_LOCAL, []byte{192, 0, 2, byte(i)})
	}
	do(t, c, &b)
	port, err := c.Port()
	if err != nil {
		t.Fatal(err)
	}
	poll()
	if len(heard) != 1 || heard[port] != 3 {
		t.Errorf("heard %v, want 3 notifications by port %d", heard, port)
	}
	poll()
	if len(heard) != 0 {
		t.Errorf("heard %v a second time", heard)
	}
}

func TestPollTellsOfLostNotifications(t *testing.T) {
	ns := netns.New(t)
	l, c := listen(t, ns, unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_IFADDR), dial(t, ns)
	var b kernel.Batch
	for i := range 10_000 {
		for _, typ := range []uint16{unix.RTM_NEWADDR, unix.RTM_DELADDR} {
			b.Add(typ, 0, kernel.IfAddr(1, 32, 0))
			b.Attr(unix.IFA_LOCAL, []byte{127, 9, byte(i >> 8), byte(i)})
		}
	}
	if _, err := c.Do(&b); err != nil {
		t.Fatal(err)
	}
	if err := l.Poll(func(kernel.Message) {}); !errors.Is(err, kernel.ErrLost) {
		t.Errorf("poll: %v, want ErrLost", err)
	}
	if err := l.Poll(func(kernel.Message) { t.Error("something was left") }); err != nil {
		t.Errorf("poll after a loss: %v", err)
	}
}

func TestWaitEndsWithClose(t *testing.T) {
	l := listen(t, netns.New(t), unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	done := make(chan error, 1)
	go func() { done <- l.Wait(func(kernel.Message) {}) }()
	l.Close()
	if err := <-done; !errors.Is(err, os.ErrClosed) {
		t.Errorf("wait: %v, want os.ErrClosed", err)
	}
}

func TestGetOfWhatIsNotThere(t *testing.T) {
	c := dial(t, netns.New(t))
	var b kernel.Batch
	b.Add(unix.RTM_GETLINK, 0, kernel.IfInfo(0, 0, 0))
	b.String(unix.IFLA_IFNAME, "nowhere")
	for range 2 {
		if err := c.Get(&b, func(kernel.Message) error { t.Error("an answer"); return nil }); !errors.Is(err, unix.ENODEV) {
			t.Errorf("get: %v, want ENODEV", err)
		}
	}
}

func netfilter(t *testing.T, ns *kernel.NS) *kernel.Conn {
	t.Helper()
	c, err := kernel.DialNetfilter(ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func table(b *kernel.Batch, msg uint16, flags int, name string) {
	b.Add(kernel.NFTables(msg), flags, kernel.NFGen(unix.NFPROTO_INET))
	b.String(unix.NFTA_TABLE_NAME, name)
}

func tables(t *testing.T, c *kernel.Conn) (names []string) {
	t.Helper()
	var b kernel.Batch
	b.Add(kernel.NFTables(unix.NFT_MSG_GETTABLE), 0, kernel.NFGen(unix.NFPROTO_INET))
	err := c.Dump(&b, func() { names = nil }, func(m kernel.Message) error {
		for t, v := range kernel.Attrs(m.Body[4:]) {
			if t == unix.NFTA_TABLE_NAME {
				names = append(names, kernel.Text(v))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestTransactionIsAllOrNothing(t *testing.T) {
	c := netfilter(t, netns.New(t))
	var b kernel.Batch
	for _, n := range []string{"a", "b"} {
		table(&b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, n)
	}
	if err := c.Transact(&b, 0); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	table(&b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "c")
	table(&b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "a")
	table(&b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, "d")
	var refused *kernel.RequestError
	if err := c.Transact(&b, 0); !errors.As(err, &refused) || refused.Index != 1 || refused.Errno != unix.EEXIST {
		t.Errorf("transact: %v, want request 1 refused with EEXIST", err)
	}
	if got := tables(t, c); len(got) != 2 {
		t.Errorf("tables %v, want a and b", got)
	}
	var none kernel.Batch
	if err := c.Transact(&none, 0); err != nil {
		t.Errorf("an empty transaction: %v", err)
	}
}

func TestTransactionHoldsOnlyForItsGeneration(t *testing.T) {
	ns := netns.New(t)
	c, other := netfilter(t, ns), netfilter(t, ns)
	gen, err := c.Generation()
	if err != nil || gen == 0 {
		t.Fatal(gen, err)
	}
	var b kernel.Batch
	table(&b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "theirs")
	if err := other.Transact(&b, 0); err != nil {
		t.Fatal(err)
	}
	b.Reset()
	table(&b, unix.NFT_MSG_DELTABLE, 0, "theirs")
	if err := c.Transact(&b, gen); !errors.Is(err, kernel.ErrGeneration) {
		t.Errorf("transact on an old generation: %v, want ErrGeneration", err)
	}
	if gen, err = c.Generation(); err != nil {
		t.Fatal(err)
	}
	if err := c.Transact(&b, gen); err != nil {
		t.Errorf("transact on the current generation: %v", err)
	}
	if got := tables(t, c); len(got) != 0 {
		t.Errorf("tables %v, want none", got)
	}
}

// TestInterruptedDumpIsNoList changes nftables all the time while a large set is listed.
func TestInterruptedDumpIsNoList(t *testing.T) {
	ns := netns.New(t)
	c, other := netfilter(t, ns), netfilter(t, ns)
	const n = 12_000
	var b kernel.Batch
	table(&b, unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, "t")
	b.Add(kernel.NFTables(unix.NFT_MSG_NEWSET), unix.NLM_F_CREATE, kernel.NFGen(unix.NFPROTO_INET))
	b.String(unix.NFTA_SET_TABLE, "t")
	b.String(unix.NFTA_SET_NAME, "s")
	b.Attr(unix.NFTA_SET_KEY_LEN, []byte{0, 0, 0, 4})
	b.Attr(unix.NFTA_SET_ID, []byte{0, 0, 0, 1})
	if err := c.Transact(&b, 0); err != nil {
		t.Fatal(err)
	}
	for from := 0; from < n; from += 3000 {
		b.Reset()
		b.Add(kernel.NFTables(unix.NFT_MSG_NEWSETELEM), unix.NLM_F_CREATE, kernel.NFGen(unix.NFPROTO_INET))
		b.String(unix.NFTA_SET_ELEM_LIST_TABLE, "t")
		b.String(unix.NFTA_SET_ELEM_LIST_SET, "s")
		b.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS, func() {
			for i := from; i < from+3000; i++ {
				b.Nest(unix.NFTA_LIST_ELEM, func() {
					b.Nest(unix.NFTA_SET_ELEM_KEY, func() { b.Attr(unix.NFTA_DATA_VALUE, []byte{0, 0, byte(i >> 8), byte(i)}) })
				})
			}
		})
		if err := c.Transact(&b, 0); err != nil {
			t.Fatal(err)
		}
	}
	list := func() (count int, err error) {
		var b kernel.Batch
		b.Add(kernel.NFTables(unix.NFT_MSG_GETSETELEM), 0, kernel.NFGen(unix.NFPROTO_INET))
		b.String(unix.NFTA_SET_ELEM_LIST_TABLE, "t")
		b.String(unix.NFTA_SET_ELEM_LIST_SET, "s")
		err = c.Dump(&b, func() { count = 0 }, func(m kernel.Message) error {
			for t, v := range kernel.Attrs(m.Body[4:]) {
				if t == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
					for range kernel.Attrs(v) {
						count++
					}
				}
			}
			return nil
		})
		return count, err
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for msg := uint16(unix.NFT_MSG_NEWTABLE); ; msg = unix.NFT_MSG_NEWTABLE + unix.NFT_MSG_DELTABLE - msg {
			select {
			case <-stop:
				return
			default:
			}
			var b kernel.Batch
			table(&b, msg, 0, "churn")
			other.Transact(&b, 0)
		}
	}()
	interrupted := 0
	for range 20 {
		switch count, err := list(); {
		case errors.Is(err, kernel.ErrDumpInterrupted):
			interrupted++
		case err != nil || count != n:
			t.Errorf("a list of %d elements of %d, %v", count, n, err)
		}
	}
	close(stop)
	<-stopped
	if count, err := list(); err != nil || count != n {
		t.Errorf("in peace a list of %d elements of %d, %v", count, n, err)
	}
	t.Logf("%d of 20 lists were given up", interrupted)
}
