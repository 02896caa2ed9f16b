package testkit

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"code.cloudfoundry.org/silk/internal/sqldb"
)

// mariadbProgram finds a program of Debian's package mariadb-server, which need not be in the path of an ordinary user.
func mariadbProgram(name string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/usr/bin"} {
		if p := filepath.Join(dir, name); fileExists(p) {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s of MariaDB (Debian package mariadb-server): %w", name, exec.ErrNotFound)
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// StartMariaDB makes a new MariaDB data directory and starts its server. The caller calls Stop.
func StartMariaDB(ctx context.Context, o Options) (*Server, error) {
	s, owner, err := newMariaDB(ctx)
	if err != nil {
		return nil, err
	}
	args := o.Args
	if o.Cert != "" {
		cert, key, err := ownCopies(s.dir, owner, o)
		if err != nil {
			os.RemoveAll(s.dir)
			return nil, err
		}
		args = append([]string{"--skip-networking=0", "--bind-address=127.0.0.1", "--port=" + strconv.Itoa(o.Port), "--ssl-cert=" + cert, "--ssl-key=" + key}, args...)
	}
	if !o.Durable {
		args = append([]string{"--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"}, args...)
	}
	if err := s.startMariaDB(owner, args...); err != nil {
		os.RemoveAll(s.dir)
		return nil, err
	}
	return s, s.await(ctx)
}

// newMariaDB makes a data directory with an administrator who needs no password.
func newMariaDB(ctx context.Context) (*Server, *syscall.Credential, error) {
	install, err := mariadbProgram("mariadb-install-db")
	if err != nil {
		return nil, nil, err
	}
	owner, err := unprivileged("mysql")
	if err != nil {
		return nil, nil, err
	}
	dir, err := newDir("my", owner)
	if err != nil {
		return nil, nil, err
	}
	_, err = run(ctx, owner, dir, nil, install, "--no-defaults", "--datadir="+filepath.Join(dir, "data"), "--tmpdir="+dir, "--auth-root-authentication-method=normal",
		"--skip-test-db", "--skip-name-resolve", "--innodb-flush-method=nosync", "--innodb-log-file-size=16M", "--skip-log-bin")
	if err != nil {
		os.RemoveAll(dir)
		return nil, nil, err
	}
	return &Server{dialect: sqldb.MySQL, dir: dir, socket: filepath.Join(dir, "s"), admin: "mysql", user: "root"}, owner, nil
}

func (s *Server) startMariaDB(owner *syscall.Credential, args ...string) error {
	program, err := mariadbProgram("mariadbd")
	if err != nil {
		return err
	}
	all := []string{"--no-defaults", "--datadir=" + filepath.Join(s.dir, "data"), "--tmpdir=" + s.dir, "--socket=" + s.socket, "--pid-file=" + filepath.Join(s.dir, "pid"),
		"--skip-networking", "--skip-log-bin", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--performance-schema=OFF",
		"--max-connections=300", "--character-set-server=utf8mb4", "--skip-name-resolve"}
	return s.start(owner, nil, syscall.SIGTERM, syscall.SIGKILL, program, append(all, args...)...)
}
