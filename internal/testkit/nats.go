package testkit

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// NATSOptions are what a NATS server asks of its clients, and more.
type NATSOptions struct {
	User, Password string

	// CA, Cert and Key are files: with them the server speaks TLS, and asks clients for a certificate of the CA.
	CA, Cert, Key string

	// Config is the text of a configuration file, for what has no option here.
	Config string
}

// NATS is a real NATS server of this test run, on a port of the loopback interface. It dies with the test process whatever happens to that.
type NATS struct {
	Port   int
	server *Server
}

// StartNATS starts a server until the test ends.
func StartNATS(t testing.TB, o NATSOptions) *NATS {
	t.Helper()
	program, err := exec.LookPath("nats-server")
	if err != nil {
		program = "/usr/sbin/nats-server"
		_, err = os.Stat(program)
	}
	Require(t, "nats", err)
	n, err := startNATS(program, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.server.Stop)
	return n
}

func startNATS(program string, o NATSOptions) (*NATS, error) {
	owner, err := unprivileged("nats")
	if err != nil {
		return nil, err
	}
	dir, err := newDir("nats", owner)
	if err != nil {
		return nil, err
	}
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	n := &NATS{Port: port, server: &Server{dir: dir}}
	args := []string{"-a", "127.0.0.1", "-p", strconv.Itoa(port)}
	if o.User != "" {
		args = append(args, "--user", o.User, "--pass", o.Password)
	}
	if o.Cert != "" {
		cert, key, err := ownCopies(dir, owner, Options{Cert: o.Cert, Key: o.Key})
		if err != nil {
			return nil, err
		}
		ca := filepath.Join(dir, "ca.crt")
		b, err := os.ReadFile(o.CA)
		if err := errors.Join(err, os.WriteFile(ca, b, 0o644)); err != nil {
			return nil, err
		}
		args = append(args, "--tlsverify", "--tlscacert", ca, "--tlscert", cert, "--tlskey", key)
	}
	if o.Config != "" {
		file := filepath.Join(dir, "nats.conf")
		if err := os.WriteFile(file, []byte(o.Config), 0o644); err != nil {
			return nil, err
		}
		args = append(args, "-c", file)
	}
	if err := n.server.start(owner, nil, syscall.SIGKILL, syscall.SIGKILL, program, args...); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return n, n.await()
}

// await waits until the server greets those who connect.
func (n *NATS) await() error {
	var last error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		if last = n.greets(); last == nil {
			return nil
		}
		select {
		case <-n.server.gone:
			return fmt.Errorf("nats-server ended: %s", n.server.output)
		case <-time.After(10 * time.Millisecond):
		}
	}
	n.server.stop()
	return fmt.Errorf("nats-server did not start: %w\n%s", last, n.server.output)
}

func (n *NATS) greets() error {
	c, err := net.DialTimeout("tcp", n.Address(), time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && !strings.HasPrefix(line, "INFO ") {
		err = fmt.Errorf("it says %.80q", line)
	}
	return err
}

// Address returns where the server listens.
func (n *NATS) Address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(n.Port)) }

// Kill ends the server as the kernel would that has no memory left.
func (n *NATS) Kill() { n.server.Kill() }

// Restart starts the server after Kill, on the same port.
func (n *NATS) Restart() error {
	if err := n.server.again(); err != nil {
		return err
	}
	return n.await()
}

// Pause stops the server where it is: its connections stand and nobody is at their other end. Resume lets it go on.
func (n *NATS) Pause() error { return n.server.signal(syscall.SIGSTOP) }

// Resume is the end of Pause.
func (n *NATS) Resume() error { return n.server.signal(syscall.SIGCONT) }
