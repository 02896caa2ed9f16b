package testkit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/sqldb"
)

// Options of a database server.
type Options struct {
	// Durable makes every commit reach the disk, as in production. Without it the server is faster and forgets when the machine stops.
	Durable bool

	// Args are added to the server's command line.
	Args []string

	// Cert and Key are files with the server's certificate, for tests of TLS; the server then also listens on Port of 127.0.0.1.
	Cert, Key string
	Port      int
}

// Server is a real database server of this test run: its own data in its own temporary directory, on a socket in there. It runs as an
// unprivileged user when the test runs as root, and dies with the test process whatever happens to that.
type Server struct {
	dialect string
	dir     string
	socket  string // what a sqldb.Config has as its host
	port    uint16
	admin   string // a database that is there
	user    string
	output  *output
	names   atomic.Int64

	stop   func()       // ends the process and waits for it
	again  func() error // starts it once more
	signal func(os.Signal) error
	gone   <-chan struct{}
}

// Config returns how to reach a database of the server. The empty name is one that is always there.
func (s *Server) Config(database string) sqldb.Config {
	if database == "" {
		database = s.admin
	}
	return sqldb.Config{Type: s.dialect, Host: s.socket, Port: s.port, User: s.user, Name: database, Timeout: 20}
}

// NewDatabase makes an empty database and returns how to reach it.
func (s *Server) NewDatabase(ctx context.Context) (sqldb.Config, error) {
	name := fmt.Sprintf("silk_%d", s.names.Add(1))
	if err := s.Admin(ctx, "CREATE DATABASE "+name); err != nil {
		return sqldb.Config{}, err
	}
	return s.Config(name), nil
}

// Admin runs one statement as the server's administrator, outside the databases of tests.
func (s *Server) Admin(ctx context.Context, statement string) error {
	db, err := sqldb.Open(ctx, s.Config(""))
	if err != nil {
		return err
	}
	defer db.Close()
	if _, err := db.Exec(ctx, statement); err != nil {
		return fmt.Errorf("%s: %w", statement, err)
	}
	return nil
}

// Stop ends the server and removes its directory.
func (s *Server) Stop() {
	s.stop()
	os.RemoveAll(s.dir)
}

// Kill ends the server and leaves its data.
func (s *Server) Kill() { s.stop() }

// Restart starts the server after Kill, on the same data.
func (s *Server) Restart(ctx context.Context) error {
	if err := s.again(); err != nil {
		return err
	}
	return s.await(ctx)
}

// Dir returns the server's directory.
func (s *Server) Dir() string { return s.dir }

// newDir makes a directory for a server below the temporary directory, owned by owner, and removes those that dead test runs left. That one is in use is
// told by a lock, which also holds where its process cannot be seen: in another PID namespace.
func newDir(kind string, owner *syscall.Credential) (string, error) {
	old, _ := filepath.Glob(filepath.Join(os.TempDir(), "silk-"+kind+"-*"))
	for _, d := range old {
		if f, err := os.Open(filepath.Join(d, lockName)); err == nil {
			if syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
				os.RemoveAll(d)
			}
			f.Close()
		}
	}
	dir, err := os.MkdirTemp("", fmt.Sprintf("silk-%s-%d-", kind, os.Getpid()))
	if err != nil {
		return "", err
	}
	f, err := os.Create(filepath.Join(dir, lockName))
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		return "", fmt.Errorf("lock %s: %w", dir, err)
	}
	locks.mu.Lock()
	locks.held = append(locks.held, f)
	locks.mu.Unlock()
	if owner != nil {
		err = os.Chown(dir, int(owner.Uid), int(owner.Gid))
	}
	return dir, err
}

const lockName = ".lock"

// locks are held until the process ends.
var locks struct {
	mu   sync.Mutex
	held []*os.File
}

// unprivileged returns as whom servers run: nil for the present user, else the first user of the list that exists.
func unprivileged(names ...string) (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, n := range append(names, "nobody") {
		u, err := user.Lookup(n)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			return nil, err
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, fmt.Errorf("no unprivileged user among %v", names)
}

// run runs a program to its end and returns its output with the error.
func run(ctx context.Context, owner *syscall.Credential, dir string, env []string, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: owner}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return out, fmt.Errorf("%s: %w\n%s", filepath.Base(name), err, out)
	}
	return out, nil
}

// output keeps the last part of what a server says.
type output struct {
	mu sync.Mutex
	b  []byte
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.b = append(o.b, p...)
	if len(o.b) > 64<<10 {
		o.b = bytes.Clone(o.b[len(o.b)-32<<10:])
	}
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.b)
}

// start runs the server. Its parent is a thread that lives as long as the server does, so that the kernel sends it the signal dies when
// the test process is gone, however that came about.
func (s *Server) start(owner *syscall.Credential, env []string, quit, dies syscall.Signal, name string, args ...string) error {
	s.again = func() error { return s.start(owner, env, quit, dies, name, args...) }
	cmd := exec.Command(name, args...)
	s.output = &output{}
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.Env = s.dir, s.output, s.output, append(os.Environ(), env...)
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: owner, Pdeathsig: dies, Setpgid: true}
	started, gone := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
		close(gone)
	}()
	if err := <-started; err != nil {
		return err
	}
	s.gone, s.signal = gone, cmd.Process.Signal
	var once sync.Once
	s.stop = func() {
		once.Do(func() {
			cmd.Process.Signal(quit)
			select {
			case <-gone:
			case <-time.After(20 * time.Second):
				cmd.Process.Kill()
				<-gone
			}
		})
	}
	return nil
}

// await waits until the server answers.
func (s *Server) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer cancel()
	watch.Go(func() {
		select {
		case <-s.gone:
			cancel()
		case <-ctx.Done():
		}
	})
	cfg := s.Config("")
	cfg.Timeout = 60
	db, err := sqldb.Open(ctx, cfg)
	if err != nil {
		s.Stop()
		return fmt.Errorf("%s did not start: %w\n%s", s.dialect, err, s.output)
	}
	return db.Close()
}

var shared struct {
	mu      sync.Mutex
	servers map[string]*Server
	errs    map[string]error
}

// Postgres returns the PostgreSQL server that the tests of this process share, started at the first call.
func Postgres(t testing.TB) *Server { return share(t, sqldb.Postgres, StartPostgres) }

// MariaDB returns the MariaDB server that the tests of this process share, started at the first call.
func MariaDB(t testing.TB) *Server { return share(t, sqldb.MySQL, StartMariaDB) }

func share(t testing.TB, name string, start func(context.Context, Options) (*Server, error)) *Server {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.servers == nil {
		shared.servers, shared.errs = map[string]*Server{}, map[string]error{}
	}
	if shared.servers[name] == nil && shared.errs[name] == nil {
		shared.servers[name], shared.errs[name] = start(context.Background(), Options{})
	}
	err := shared.errs[name]
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, exec.ErrNotFound) {
		t.Fatal(err) // it is there and does not work
	}
	Require(t, name, err)
	return shared.servers[name]
}

// Main is the TestMain of packages that use Postgres or MariaDB: it runs the tests, ends the servers and exits.
func Main(m *testing.M) {
	code := m.Run()
	shared.mu.Lock()
	for _, s := range shared.servers {
		if s != nil {
			s.Stop()
		}
	}
	os.Exit(code)
}

// Database returns a new and empty database of an engine ("sqlite", "postgres", "mysql"), or skips the test where there is no such engine.
func Database(t testing.TB, engine string) sqldb.Config {
	t.Helper()
	var s *Server
	switch engine {
	case sqldb.SQLite:
		return sqldb.Config{Type: sqldb.SQLite, Path: filepath.Join(t.TempDir(), "silk.db"), Timeout: 20}
	case sqldb.Postgres:
		s = Postgres(t)
	default:
		s = MariaDB(t)
	}
	cfg, err := s.NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// Engines lists what Database takes.
var Engines = []string{sqldb.SQLite, sqldb.Postgres, sqldb.MySQL}

// FreePort returns a TCP port of the loopback interface that was free a moment ago.
func FreePort() (int, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return ln.Addr().(*net.TCPAddr).Port, ln.Close()
}
