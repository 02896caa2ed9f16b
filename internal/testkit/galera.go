package testkit

import (
	"context"
	"fmt"
	"io/fs"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/internal/sqldb"
)

const galeraProvider = "/usr/lib/galera/libgalera_smm.so"

// StartGalera makes a cluster of MariaDB servers that replicate to each other over the loopback interface. It needs Debian's packages
// mariadb-server, galera-4 and rsync. The caller calls Stop of each.
func StartGalera(ctx context.Context, nodes int) (cluster []*Server, err error) {
	if !fileExists(galeraProvider) {
		return nil, fmt.Errorf("%s (Debian package galera-4): %w", galeraProvider, fs.ErrNotExist)
	}
	if _, err := exec.LookPath("rsync"); err != nil {
		return nil, fmt.Errorf("rsync, with which a node joins: %w", err)
	}
	defer func() {
		if err != nil {
			for _, s := range cluster {
				s.Stop()
			}
			cluster = nil
		}
	}()
	first := 0
	for i := range nodes {
		s, owner, err := newMariaDB(ctx)
		if err != nil {
			return cluster, err
		}
		var ports [3]int // of the group, of incremental transfers, of whole ones
		for j := range ports {
			if ports[j], err = FreePort(); err != nil {
				return cluster, err
			}
		}
		join := "gcomm://"
		if i == 0 {
			first = ports[0]
		} else {
			join += "127.0.0.1:" + strconv.Itoa(first)
		}
		provider := strings.Join([]string{"base_host=127.0.0.1", fmt.Sprintf("base_port=%d", ports[0]), fmt.Sprintf("gmcast.listen_addr=tcp://127.0.0.1:%d", ports[0]),
			fmt.Sprintf("ist.recv_addr=127.0.0.1:%d", ports[1]), "gcache.size=16M"}, ";")
		err = s.startMariaDB(owner, "--binlog-format=ROW", "--innodb-autoinc-lock-mode=2", "--innodb-flush-log-at-trx-commit=0", "--wsrep-on=ON",
			"--wsrep-provider="+galeraProvider, "--wsrep-cluster-name=silk"+strconv.Itoa(first),
			"--wsrep-cluster-address="+join, "--wsrep-node-name=n"+strconv.Itoa(i), "--wsrep-node-address=127.0.0.1", "--wsrep-sst-method=rsync",
			"--wsrep-sst-receive-address=127.0.0.1:"+strconv.Itoa(ports[2]), "--wsrep-provider-options="+provider)
		if err != nil {
			return cluster, err
		}
		cluster = append(cluster, s)
		if err := s.await(ctx); err != nil {
			return cluster, err
		}
	}
	return cluster, nil
}

// Galera returns a new and empty database of a new cluster, once for each of its two nodes, or skips the test where there can be none.
func Galera(t testing.TB) [2]sqldb.Config {
	t.Helper()
	cluster, err := StartGalera(t.Context(), 2)
	Require(t, "galera", err)
	t.Cleanup(func() {
		for i := len(cluster) - 1; i >= 0; i-- {
			cluster[i].Stop()
		}
	})
	cfg, err := cluster[0].NewDatabase(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return [2]sqldb.Config{cfg, cluster[1].Config(cfg.Name)}
}
