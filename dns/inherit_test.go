package dns_test

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
)

// underSupervision starts the program with the files that a supervisor holds for it.
func underSupervision(t testing.TB, h host, cfg object, files []*os.File) *process {
	t.Helper()
	return launchHolding(t, cfg, h.ns.Do, files, "sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=2 exec "$0" "$@"`, binary, "-config")
}

// TestQuestionsWaitForTheNextProcess: with sockets that a supervisor holds no lookup fails while the program is killed and started again and again.
func TestQuestionsWaitForTheNextProcess(t *testing.T) {
	h := newHost(t)
	r, _ := h.attach("one", endpoint.Advertisement{Names: []string{"api.apps.internal"}})
	const at = "127.0.0.1:5300"
	var files []*os.File
	if err := h.ns.Do(func() error {
		pc, err := net.ListenPacket("udp4", at)
		if err != nil {
			return err
		}
		defer pc.Close()
		ln, err := net.Listen("tcp4", at)
		if err != nil {
			return err
		}
		defer ln.Close()
		for _, s := range []interface{ File() (*os.File, error) }{pc.(*net.UDPConn), ln.(*net.TCPListener)} {
			f, err := s.File()
			if err != nil {
				return err
			}
			files = append(files, f)
			t.Cleanup(func() { f.Close() })
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	cfg := settings(t, object{"endpoint_dir": h.dir.Path(), "listen_dns": []string{at}})
	p := underSupervision(t, h, cfg, files)
	stop, done := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		defer func() { done <- n }()
		for {
			select {
			case <-stop:
				return
			default:
			}
			var got string
			var err error
			for range 2 { // as resolvers do: a question that was read is lost with who read it
				if err = h.ns.Do(func() (err error) {
					got, err = ask(t.Context(), at, "api.apps.internal")
					return err
				}); err == nil {
					break
				}
			}
			if n++; err != nil || got != "NOERROR "+r.Address().String() {
				t.Errorf("lookup %d: %q, %v", n, got, err)
			}
		}
	}()
	for range 8 {
		pause := time.NewTimer(100 * time.Millisecond)
		<-pause.C
		p.Kill()
		p = underSupervision(t, h, cfg, files)
	}
	close(stop)
	if n := <-done; n < 100 {
		t.Errorf("only %d lookups", n)
	} else {
		t.Logf("%d lookups", n)
	}
	if !strings.Contains(p.Log(), at) {
		t.Error("the log does not say where it listens")
	}
}
