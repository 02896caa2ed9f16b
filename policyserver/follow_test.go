package policyserver_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/internal/sqldb"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/secgroup"
)

// asgSyncer is a configuration of the deployed policy-server-asg-syncer.
const asgSyncer = `{"uuid":"a-1","database":{},"uaa_client":"network-policy","uaa_client_secret":"secret","uaa_url":"https://uaa","uaa_port":8443,"uaa_ca":"DIR/ca","cc_ca_cert":"DIR/ca",
	"cc_url":"https://cc","cc_internal_url":"https://cc:9023","cc_internal_ca_cert":"DIR/ca","cc_internal_client_cert":"DIR/c","cc_internal_client_key":"DIR/k",
	"log_prefix":"cfnetworking","metron_address":"127.0.0.1:3457","log_level":"info","skip_ssl_validation":false,"asg_poll_interval_seconds":60,"retry_deadline_seconds":300,
	"locket_address":"locket.service.cf.internal:8891","locket_ca_cert_file":"DIR/ca","locket_client_cert_file":"DIR/c","locket_client_key_file":"DIR/k"}`

// TestTheDeployedSyncersConfigurationFollows starts the program as the deployed syncer is configured, beside a server of both APIs, which serves what it finds.
func TestTheDeployedSyncersConfigurationFollows(t *testing.T) {
	w, f := newWorld(t, sqldb.Postgres), newFoundry(t)
	f.asgs = []string{"one"}
	serving := start(t, w.load(t, w.both(t, nil)), quiet(t))
	keys := f.keys()
	keys["cc_internal_url"] = f.URL
	start(t, w.deployed(t, asgSyncer, "syncer.json", keys), quiet(t))
	tc := w.client(t, "agent")
	g := agent(t, serving.Internal, tc).SecurityGroups()
	ask := secgroup.Ask{Host: "10.0.0.1"}
	for _, want := range []int{1, 2} {
		eventually(t, "the agent is told", func() bool {
			u, err := g.Watch(t.Context(), ask)
			if err != nil {
				t.Fatal(err)
			}
			return u.Count == want
		})
		f.with(func() {
			f.asgs = []string{"one", "two"}
			f.stamp++
		})
	}
	if _, err := person(t, "https://"+serving.External, tc, "shop").SecurityGroups().List(t.Context()); err == nil {
		t.Error("security groups are shown to somebody who is no admin")
	}
}

// TestAnotherServerFollowsWhenTheActiveOneIsKilled kills, without warning, the one of two processes that follows Cloud Controller.
func TestAnotherServerFollowsWhenTheActiveOneIsKilled(t *testing.T) {
	bin, w, f := testkit.Program(t, "policy-server"), newWorld(t, sqldb.Postgres), newFoundry(t)
	f.asgs = []string{"one"}
	keys := w.both(t, f.keys())
	keys["cc_internal_url"], keys["auth"] = f.URL, []string{"tokens"}
	b, err := json.Marshal(keys)
	if err != nil {
		t.Fatal(err)
	}
	config := w.file(t, "config.json", string(b))
	servers := [2]process{launch(t, bin, config), launch(t, bin, config)}
	active := func(s process) bool {
		_, text := fetch(t, "http://"+s.Debug+"/metrics")
		return strings.Contains(text, "\nsilk_policy_server_security_groups_sync_active 1\n")
	}
	eventually(t, "one follows", func() bool { return active(servers[0]) != active(servers[1]) })
	if active(servers[1]) {
		servers[0], servers[1] = servers[1], servers[0]
	}
	g := agent(t, servers[1].Internal, w.client(t, "agent")).SecurityGroups()
	eventually(t, "the group is there", func() bool {
		u, err := g.Watch(t.Context(), secgroup.Ask{Host: "h"})
		return err == nil && u.Count == 1
	})
	f.with(func() {
		f.asgs = []string{"one", "two"}
		f.stamp++
	})
	start := time.Now()
	if err := servers[0].Cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	testkit.Until(t, 40*time.Second, "the other server follows", func() bool {
		u, err := g.Watch(t.Context(), secgroup.Ask{Host: "h"})
		return err == nil && u.Count == 2
	})
	t.Logf("the other server followed after %v", time.Since(start))
	if !active(servers[1]) {
		t.Error("nobody says that it follows")
	}
}
