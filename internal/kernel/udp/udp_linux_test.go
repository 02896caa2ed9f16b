package udp_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/kernel/udp"
)

const size = 64

// listen opens a socket for the test.
func listen(t testing.TB, address string) *net.UDPConn {
	t.Helper()
	network := "udp4"
	if netip.MustParseAddrPort(address).Addr().Is6() {
		network = "udp6"
	}
	c, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func newBatch(t testing.TB, c *net.UDPConn, n int) *udp.Batch {
	t.Helper()
	b, err := udp.New(c, n, size)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// client opens a connected socket that waits for answers for a while.
func client(t testing.TB, to netip.AddrPort) *net.UDPConn {
	t.Helper()
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

func local(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

// write sends a datagram.
func write(t testing.TB, c *net.UDPConn, text string) {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

// read returns what came, which a connected socket takes from the address alone that it is connected to.
func read(t testing.TB, c *net.UDPConn) string {
	t.Helper()
	b := make([]byte, size)
	n, err := c.Read(b)
	if err != nil {
		t.Fatalf("no answer from %v: %v", c.RemoteAddr(), err)
	}
	return string(b[:n])
}

// take reads batches until all of count datagrams are there, and hands each over.
func take(t testing.TB, b *udp.Batch, count int, f func(i int, text string)) {
	t.Helper()
	for count > 0 {
		n, err := b.Read()
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			data, _ := b.Data(i)
			f(i, string(data))
		}
		if unsent := b.Send(); unsent != 0 {
			t.Errorf("%d answers were not sent", unsent)
		}
		count -= n
	}
}

// TestAnswers has clients of several addresses ask at once, more than one batch has room for: each must get its own answers, from the
// address that it asked.
func TestAnswers(t *testing.T) {
	for _, c := range []struct{ listen, ask, other string }{
		{"127.0.0.1:0", "127.0.0.1", "127.0.0.1"},
		{"0.0.0.0:0", "127.0.0.1", "127.9.8.7"},
		{"[::1]:0", "::1", "::1"},
		{"[::]:0", "::1", "::1"},
	} {
		t.Run(c.listen, func(t *testing.T) {
			server := listen(t, c.listen)
			b := newBatch(t, server, 8)
			var clients []*net.UDPConn
			for i := range 10 {
				to := c.ask
				if i%2 == 1 {
					to = c.other
				}
				clients = append(clients, client(t, netip.AddrPortFrom(netip.MustParseAddr(to), local(server).Port())))
			}
			for i, c := range clients {
				write(t, c, fmt.Sprintf("question %d", i))
				write(t, c, "") // a datagram may be empty
			}
			take(t, b, 2*len(clients), func(i int, text string) {
				if from, want := b.From(i), local(clients[0]).Addr(); from != want && c.listen[0] == '[' {
					t.Errorf("question %q is from %v, want %v", text, from, want)
				}
				b.Answer(i, []byte("answer to "+text))
			})
			for i, c := range clients {
				got := []string{read(t, c), read(t, c)}
				if want := []string{fmt.Sprintf("answer to question %d", i), "answer to "}; !slices.Equal(got, want) {
					t.Errorf("client %d got %q, want %q", i, got, want)
				}
			}
		})
	}
}

// TestLater has answers sent after the room of their questions has been used for others.
func TestLater(t *testing.T) {
	server := listen(t, "0.0.0.0:0")
	b := newBatch(t, server, 1)
	later := map[string]func([]byte) error{}
	var clients []*net.UDPConn
	for i := range 3 {
		c := client(t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, byte(i + 1)}), local(server).Port()))
		clients = append(clients, c)
		write(t, c, fmt.Sprint(i))
		take(t, b, 1, func(i int, text string) { later[text] = b.Later(i) })
	}
	var wg sync.WaitGroup
	for text, answer := range later {
		wg.Go(func() {
			if err := answer([]byte("to " + text)); err != nil {
				t.Errorf("answer: %v", err)
			}
		})
	}
	wg.Wait()
	for i, c := range clients {
		if got, want := read(t, c), fmt.Sprintf("to %d", i); got != want {
			t.Errorf("client %d got %q, want %q", i, got, want)
		}
	}
	server.Close()
	if err := later["0"](nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("answer after the socket was closed: %v, want net.ErrClosed", err)
	}
}

// TestTooLong has a datagram come that is longer than its room.
func TestTooLong(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	b := newBatch(t, server, 2)
	c := client(t, local(server))
	for _, n := range []int{size, size + 1} {
		write(t, c, string(make([]byte, n)))
	}
	wants := []bool{true, false}
	for len(wants) > 0 {
		n, err := b.Read()
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if data, whole := b.Data(i); len(data) != size || whole != wants[0] {
				t.Errorf("%d bytes, whole: %v; want %d, %v", len(data), whole, size, wants[0])
			}
			wants = wants[1:]
		}
	}
}

// TestOthersAreAnswered has the kernel refuse answers in the midst of others: they are longer than a datagram can be.
func TestOthersAreAnswered(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	b := newBatch(t, server, 8)
	if unsent := b.Send(); unsent != 0 {
		t.Errorf("%d of no answers were not sent", unsent)
	}
	c := client(t, local(server))
	for range 6 {
		write(t, c, "question")
	}
	answers := [][]byte{make([]byte, 70_000), []byte("1"), []byte("2"), make([]byte, 70_000), make([]byte, 70_000), []byte("3")}
	unsent := 0
	for len(answers) > 0 {
		n, err := b.Read()
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			b.Answer(i, answers[0])
			answers = answers[1:]
		}
		unsent += b.Send()
	}
	if unsent != 3 {
		t.Errorf("%d answers were not sent, want 3", unsent)
	}
	for _, want := range []string{"1", "2", "3"} {
		if got := read(t, c); got != want {
			t.Errorf("answer %q, want %q", got, want)
		}
	}
}

// TestClose has Read wait when the socket is closed, and be called again.
func TestClose(t *testing.T) {
	server := listen(t, "127.0.0.1:0")
	b := newBatch(t, server, 2)
	c := client(t, local(server))
	write(t, c, "question")
	take(t, b, 1, func(int, string) {})
	ended := make(chan error, 1)
	go func() {
		_, err := b.Read()
		ended <- err
	}()
	server.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read: %v, want net.ErrClosed", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Read waits for a closed socket")
	}
	if _, err := b.Read(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Read of a closed socket: %v, want net.ErrClosed", err)
	}
	b.Answer(0, []byte("answer"))
	if unsent := b.Send(); unsent != 1 {
		t.Errorf("Send on a closed socket: %d were not sent, want 1", unsent)
	}
}

// TestSeveralReaders has batches of several goroutines share a socket: each question is answered once, by the one who read it.
func TestSeveralReaders(t *testing.T) {
	server := listen(t, "0.0.0.0:0")
	var wg sync.WaitGroup
	for range 4 {
		b := newBatch(t, server, 4)
		wg.Go(func() {
			for {
				n, err := b.Read()
				if err != nil {
					return
				}
				for i := range n {
					data, _ := b.Data(i)
					b.Answer(i, data)
				}
				b.Send()
			}
		})
	}
	var clients sync.WaitGroup
	for i := range 8 {
		c := client(t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, byte(i + 1)}), local(server).Port()))
		clients.Go(func() {
			for k := range 200 {
				text := fmt.Sprintf("%d of client %d", k, i)
				if _, err := c.Write([]byte(text)); err != nil {
					t.Error(err)
					return
				}
				b := make([]byte, size)
				n, err := c.Read(b)
				if err != nil || string(b[:n]) != text {
					t.Errorf("%q came back, want %q: %v", b[:n], text, err)
					return
				}
			}
		})
	}
	clients.Wait()
	server.Close()
	wg.Wait()
}

// TestNoGarbage is what the package is for.
func TestNoGarbage(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0"} {
		t.Run(address, func(t *testing.T) {
			server := listen(t, address)
			b := newBatch(t, server, 4)
			to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), local(server).Port())
			if address[0] == '[' {
				to = netip.AddrPortFrom(netip.IPv6Loopback(), to.Port())
			}
			c := client(t, to)
			text, buf := []byte("question"), make([]byte, size)
			allocs := testing.AllocsPerRun(500, func() {
				c.Write(text)
				n, err := b.Read()
				if err != nil {
					t.Fatal(err)
				}
				for i := range n {
					data, _ := b.Data(i)
					b.From(i)
					b.Answer(i, data)
				}
				b.Send()
				if _, err := c.Read(buf); err != nil {
					t.Fatal(err)
				}
			})
			if allocs != 0 {
				t.Errorf("%v allocations for a question and its answer, want none", allocs)
			}
		})
	}
}
