package localsocket_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/localsocket"
	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestANameThatIsTakenIsWaitedFor, and served once it is free.
func TestANameThatIsTakenIsWaitedFor(t *testing.T) {
	at := localsocket.Name("test", 1)
	held, err := net.Listen("unix", at)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	task := localsocket.Task("test", at, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "here") }), slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- task.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	held.Close()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return localsocket.Dial(ctx, at)
	}}}
	testkit.Within(t, 20*time.Second, func() string {
		resp, err := client.Get("http://test/")
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		if b, err := io.ReadAll(resp.Body); string(b) != "here" {
			return fmt.Sprintf("%q, %v", b, err)
		}
		return ""
	})
}

// TestAnotherUserIsNotBelieved who takes the name while its program is away.
func TestAnotherUserIsNotBelieved(t *testing.T) {
	if os.Getenv("SOCKET_IMPOSTOR") != "" {
		l, err := net.Listen("unix", localsocket.Name("test", 2))
		if err != nil {
			t.Fatal(err)
		}
		os.Stdout.WriteString("listening\n")
		http.Serve(l, nil)
		return
	}
	if os.Geteuid() != 0 {
		testkit.Require(t, "root", errors.New("another user can be one only for root"))
	}
	b, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "peer") // where another user can go
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(dir+"/impostor", b, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(dir+"/impostor", "-test.run", "^TestAnotherUserIsNotBelieved$")
	cmd.Env = append(os.Environ(), "SOCKET_IMPOSTOR=1")
	cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	c, err := localsocket.Dial(t.Context(), localsocket.Name("test", 2))
	if err == nil {
		c.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "user 65534 listens") {
		t.Errorf("connected: %v", err)
	}
}
