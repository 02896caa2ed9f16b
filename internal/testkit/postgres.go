package testkit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/internal/sqldb"
)

// postgresProgram returns the path of a program of the newest PostgreSQL that Debian's packages installed.
func postgresProgram(name string) (string, error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/" + name)
	if len(found) == 0 {
		return "", fmt.Errorf("%s of PostgreSQL below /usr/lib/postgresql (Debian package postgresql): %w", name, fs.ErrNotExist)
	}
	version := func(p string) int {
		n, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(p))))
		return n
	}
	return slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) }), nil
}

// StartPostgres makes a new PostgreSQL cluster and starts its server. The caller calls Stop.
func StartPostgres(ctx context.Context, o Options) (*Server, error) {
	initdb, err := postgresProgram("initdb")
	if err != nil {
		return nil, err
	}
	owner, err := unprivileged("postgres")
	if err != nil {
		return nil, err
	}
	dir, err := newDir("pg", owner)
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	_, err = run(ctx, owner, dir, []string{"LC_ALL=C"}, initdb, "-D", data, "-U", "silk", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions")
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	s := &Server{dialect: sqldb.Postgres, dir: dir, socket: dir, port: 5432, admin: "postgres", user: "silk"}
	args := []string{"-D", data, "-k", dir, "-c", "max_connections=300", "-c", "shared_buffers=64MB", "-c", "log_min_messages=fatal", "-c", "deadlock_timeout=100ms",
		"-c", "log_min_error_statement=fatal", "-c", "listen_addresses="}
	if !o.Durable {
		args = append(args, "-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off")
	}
	if o.Cert != "" {
		cert, key, err := ownCopies(dir, owner, o)
		if err != nil {
			s.Stop()
			return nil, err
		}
		args = append(args, "-c", "listen_addresses=127.0.0.1", "-p", strconv.Itoa(o.Port), "-c", "ssl=on", "-c", "ssl_cert_file="+cert, "-c", "ssl_key_file="+key)
		s.port = uint16(o.Port)
	}
	program := filepath.Join(filepath.Dir(initdb), "postgres")
	if err := s.start(owner, []string{"LC_ALL=C"}, syscall.SIGINT, syscall.SIGQUIT, program, append(args, o.Args...)...); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return s, s.await(ctx)
}

// ownCopies gives the server a certificate and a key that it may read and nobody else.
func ownCopies(dir string, owner *syscall.Credential, o Options) (cert, key string, err error) {
	cert, key = filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key")
	for from, to := range map[string]string{o.Cert: cert, o.Key: key} {
		b, rerr := os.ReadFile(from)
		err = errors.Join(err, rerr, os.WriteFile(to, b, 0o600))
		if owner != nil {
			err = errors.Join(err, os.Chown(to, int(owner.Uid), int(owner.Gid)))
		}
	}
	return cert, key, err
}

var tpsLine = regexp.MustCompile(`(?m)^tps = ([0-9.]+)`)

// PGBench runs PostgreSQL's own benchmark against a database of the server and returns transactions per second: clients that run script, a file in
// pgbench's language, over and over for as many whole seconds as there are in d. With two threads it is no bottleneck itself. It sends the text
// of each statement, which is its default, or prepares statements once for each connection.
func (s *Server) PGBench(ctx context.Context, database, script string, clients int, d time.Duration, prepared bool) (float64, error) {
	program, err := postgresProgram("pgbench")
	if err != nil {
		return 0, err
	}
	protocol := "simple"
	if prepared {
		protocol = "prepared"
	}
	out, err := run(ctx, nil, s.dir, nil, program, "-h", s.socket, "-p", strconv.Itoa(int(s.port)), "-U", s.user, "-n", "-M", protocol,
		"-c", strconv.Itoa(clients), "-j", "2", "-T", strconv.Itoa(max(1, int(d.Seconds()))), "-f", script, database)
	if err != nil {
		return 0, err
	}
	m := tpsLine.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("pgbench printed no rate:\n%s", out)
	}
	return strconv.ParseFloat(string(m[1]), 64)
}
