package policysql_test

import (
	"slices"
	"testing"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/testkit"
	"code.cloudfoundry.org/silk/policy"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/policy/policytest"
)

// TestGalera has a policy-server at each node of a cluster, which does not lock rows across nodes: whoever commits second fails then.
func TestGalera(t *testing.T) {
	nodes := testkit.Galera(t)
	stores := []*policysql.Store{open(t, config(nodes[0])), open(t, config(nodes[1]))}
	writeAtRandom(t, stores, 16, 20)
	policytest.Eventually(t, "the stores agree", func() bool { return slices.Equal(rules(t, stores[0]), rules(t, stores[1])) })
	retries := stores[0].DBCounts().Retries + stores[1].DBCounts().Retries
	var conflicts int64
	for _, n := range nodes {
		for _, counter := range []string{"wsrep_local_cert_failures", "wsrep_local_bf_aborts"} {
			var name string
			var failed int64
			if err := connect(t, n).QueryRow(t.Context(), "SHOW STATUS LIKE '"+counter+"'").Scan(&name, &failed); err != nil {
				t.Fatal(err)
			}
			conflicts += failed
		}
	}
	t.Logf("%d transactions lost against the other node; %d were begun again", conflicts, retries)
	if retries == 0 {
		t.Error("the stores never met: the test tested nothing")
	}
	// What one node has confirmed the other acts upon at once, and hosts are counted once.
	p := policytest.Of(t, "x y tcp 1")
	for i := range 10 {
		create(t, stores[i%2], p)
		remove(t, stores[(i+1)%2], p)
		if got, err := stores[(i+1)%2].List(t.Context(), policy.Filter{Sources: []identity.Group{"x"}}); err != nil || len(got) != 0 {
			t.Fatalf("round %d: %v, %v, want nothing", i, got, err)
		}
	}
	at := create(t, stores[0], p)
	c := newCell("h", "x")
	policytest.Eventually(t, "the host has it", func() bool { c.learn(t, stores[1]); return c.ask.Since == at })
	if f := force(t, stores[0], at, nil, brief); f.InForce && f.Known > 0 {
		t.Errorf("in force before the host said so: %+v", f)
	}
	c.report(t, stores[1])
	policytest.Eventually(t, "it is in force", func() bool { f := force(t, stores[0], at, nil, brief); return f.InForce && f.Known == 1 })
}
