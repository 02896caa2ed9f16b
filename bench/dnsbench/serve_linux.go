package dnsbench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"code.cloudfoundry.org/silk/registration"
)

const (
	natsPort  = 4222
	debugPort = 8056
	tellTime  = time.Minute
	tellRate  = 20_000 // messages a second: all containers within 10 s, where emitters take 20 s to a minute
)

// serve starts silk-dns, with a NATS server, and tells it all names as emitters do: once, and once more, since it is told all the time.
func (b *run) serve(ctx context.Context) (p *process, stop func(), err error) {
	program := filepath.Join(b.dir, "silk-dns")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", program, "code.cloudfoundry.org/silk/cmd/silk-dns")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("build silk-dns: %w: %s", err, out)
	}
	config, err := json.Marshal(map[string]any{
		"domains": []string{"apps.internal"}, "listen_dns": []string{oursAt.String()}, "address_ranges": []string{"10.0.0.0/8"}, "state_dir": filepath.Join(b.dir, "state"),
		"debug_server_port": debugPort, "nats": map[string]any{"hosts": []map[string]any{{"hostname": "127.0.0.1", "port": natsPort}}},
	})
	file := filepath.Join(b.dir, "dns.json")
	if err := errors.Join(err, os.WriteFile(file, config, 0o600)); err != nil {
		return nil, nil, err
	}
	broker := exec.CommandContext(context.WithoutCancel(ctx), "nats-server", "-a", "127.0.0.1", "-p", strconv.Itoa(natsPort))
	var said bytes.Buffer
	broker.Stdout, broker.Stderr = &said, &said
	if err := b.pinned(b.loadCPUs, broker.Start); err != nil {
		return nil, nil, fmt.Errorf("NATS: %w", err)
	}
	end := func() { broker.Process.Kill(); broker.Wait() }
	p, err = b.begin(b.serverCPUs, oursAt, exec.CommandContext(context.WithoutCancel(ctx), program, "-config", file))
	if err != nil {
		end()
		return nil, nil, fmt.Errorf("silk-dns: %w", err)
	}
	stop = func() { p.stop(); end() }
	var out bytes.Buffer
	teller := self(ctx, "tell 127.0.0.1:"+strconv.Itoa(natsPort))
	teller.Stdout, teller.Stderr = &out, &out
	if err = b.pinned(b.loadCPUs, teller.Start); err == nil {
		err = teller.Wait()
	}
	if err != nil {
		stop()
		return nil, nil, fmt.Errorf("tell names: %w: %s; silk-dns said: %s", err, &out, p.said)
	}
	if err := b.ready(ctx, p); err != nil {
		stop()
		return nil, nil, err
	}
	return p, stop, nil
}

// tell publishes what emitters say at a NATS server, twice, and waits until silk-dns has all of it.
func tell(at netip.AddrPort) error {
	deadline := time.Now().Add(tellTime)
	c, err := nats.Connect("nats://"+at.String(), nats.RetryOnFailedConnect(true), nats.ReconnectWait(50*time.Millisecond), nats.MaxReconnects(-1))
	if err != nil {
		return err
	}
	defer c.Close()
	for tick := time.NewTicker(50 * time.Millisecond); ; <-tick.C {
		if n, err := gauge("silk_dns_nats_connected"); err == nil && n == 1 && c.IsConnected() {
			tick.Stop()
			break
		}
		if time.Now().After(deadline) {
			return errors.New("silk-dns does not hear NATS")
		}
	}
	for range 2 {
		begun, told := time.Now(), 0
		err := messages(func(m []byte) error {
			if told++; told%100 == 0 {
				<-time.After(time.Until(begun.Add(time.Duration(told) * time.Second / tellRate)))
			}
			return c.Publish(registration.SubjectRegister, m)
		})
		if err := errors.Join(err, c.FlushTimeout(tellTime)); err != nil {
			return err
		}
	}
	deadline = time.Now().Add(tellTime)
	for tick := time.NewTicker(50 * time.Millisecond); ; <-tick.C {
		n, err := gauge("silk_dns_names")
		if err == nil && n == names {
			tick.Stop()
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("silk-dns knows %v names of %d: %w", n, names, err)
		}
	}
}

// gauge reads a metric of silk-dns.
func gauge(name string) (float64, error) {
	c := http.Client{Timeout: 5 * time.Second}
	resp, err := c.Get(fmt.Sprintf("http://127.0.0.1:%d/metrics", debugPort))
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindSubmatch(text)
	if m == nil {
		return 0, fmt.Errorf("no %s in the metrics", name)
	}
	return strconv.ParseFloat(string(m[1]), 64)
}
