package policyagent

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
	"code.cloudfoundry.org/silk/policy/policysql"
	"code.cloudfoundry.org/silk/secgroup"
)

// internet is what the host reaches by its default route.
type internet struct {
	w  *world
	ns *kernel.NS
}

// The addresses of the internet.
var near, far = netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("198.51.100.7")

func (w *world) internet() *internet {
	w.t.Helper()
	i := &internet{w, netns.New(w.t)}
	w.onHost(fmt.Sprintf("ip link add out type veth peer name in netns /proc/%d/fd/%d && ip addr add 203.0.113.1/24 dev out && ip link set out up && ip route add default via %v",
		os.Getpid(), i.ns.FD(), near))
	netns.Shell(w.t, i.ns, fmt.Sprintf("ip link set lo up && ip addr add %v/24 dev in && ip addr add %v/32 dev lo && ip link set in up && ip route add default via 203.0.113.1", near, far))
	return i
}

// listen echoes on a tcp port of all addresses.
func (i *internet) listen(port int) {
	i.w.t.Helper()
	(&member{w: i.w, ns: i.ns}).listen(port)
}

// reachesOut reports whether a container can connect to an address outside.
func (m *member) reachesOut(to netip.Addr, port uint16) bool {
	c := m.dialOut(to, port)
	if c == nil {
		return false
	}
	defer c.Close()
	return echoes(c)
}

func (m *member) dialOut(to netip.Addr, port uint16) net.Conn {
	var c net.Conn
	m.ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp4", netip.AddrPortFrom(to, port).String(), 3*time.Second)
		return err
	})
	return c
}

// in gives a container a space and a workload.
func in(space, workload string) func(*endpoint.Spec) {
	return func(s *endpoint.Spec) {
		s.Metadata, _ = json.Marshal(map[string]string{"space_id": space, "container_workload": workload, "policy_group_id": s.Group})
	}
}

func netOut(rules string) func(*endpoint.Spec) {
	return func(s *endpoint.Spec) { s.NetOut = json.RawMessage(rules) }
}

func (w *world) attachTo(group string, more ...func(*endpoint.Spec)) *member {
	w.t.Helper()
	w.number++
	return w.attachAs(fmt.Sprintf("c%d", w.number), group, netip.Addr{}, more...)
}

func tcpTo(to string, ports string) string {
	return fmt.Sprintf(`[{"protocol":"tcp","destination":%q,"ports":%q}]`, to, ports)
}

func syncing(c *Config) { c.ASGSyncing = true }

// groupsOf opens the database and has the next agent hear security groups from it.
func (w *world) groupsOf() (*policysql.Store, *policysql.SecurityGroups) {
	s := w.policies()
	w.groups = s.SecurityGroups()
	return s, s.SecurityGroups()
}

func (w *world) create(g *policysql.SecurityGroups, r secgroup.Record) secgroup.Kept {
	w.t.Helper()
	k, err := g.Create(w.t.Context(), r)
	if err != nil {
		w.t.Fatal(err)
	}
	return k
}

// started waits for a container as its ADD does.
func (r *running) started(m *member) {
	r.t.Helper()
	if status, text := r.force("/force-policy-poll-cycle?network=silk&interface=eth0&container=" + m.key.Container); status != 200 {
		r.t.Fatalf("wait for %v: %d %s", m.key, status, text)
	}
}

func TestSecurityGroupsAreEnforced(t *testing.T) {
	w := newWorld(t)
	out := w.internet()
	out.listen(80)
	out.listen(81)
	store, groups := w.groupsOf()
	r := w.start(store, syncing, func(c *Config) {
		c.DenyNetworks = DenyNetworks{Always: []string{far.String() + "/32"}, Staging: []string{"203.0.113.0/24"}}
	})
	app, other, staging, plain := w.attachTo("web", in("s1", "app")), w.attachTo("api", in("s2", "task")), w.attachTo("web", in("s1", "staging")), w.attachTo("cron")
	all := []*member{app, other, staging, plain}
	for _, m := range all {
		r.started(m)
		if m.reachesOut(near, 80) {
			t.Errorf("%v reaches what no security group allows", m.key)
		}
	}
	w.create(groups, secgroup.Record{Name: "web", Rules: tcpTo("203.0.113.0/24,198.51.100.0/24", "80"), RunningSpaces: []string{"s1"}, StagingSpaces: []string{"s1"}})
	eventually(t, "the group of its space lets it out", patience, func() bool { return app.reachesOut(near, 80) })
	w.create(groups, secgroup.Record{Name: "cron", Rules: tcpTo("203.0.113.2", "81"), Members: []identity.Group{"cron"}})
	eventually(t, "the group of its policy group lets it out", patience, func() bool { return plain.reachesOut(near, 81) })
	for _, x := range []struct {
		m    *member
		to   netip.Addr
		port uint16
	}{{app, near, 81}, {app, far, 80}, {other, near, 80}, {staging, near, 80}, {plain, near, 80}, {other, near, 81}} {
		if x.m.reachesOut(x.to, x.port) {
			t.Errorf("%v reaches %v:%d", x.m.key, x.to, x.port)
		}
	}
	c := app.dialOut(near, 80)
	if c == nil {
		t.Fatal("no connection")
	}
	defer c.Close()
	w.create(groups, secgroup.Record{Name: "all", Rules: `[{"protocol":"all","destination":"0.0.0.0/0"}]`, RunningDefault: true})
	eventually(t, "the default lets all out that run", patience, func() bool { return other.reachesOut(near, 81) && plain.reachesOut(near, 80) })
	if app.reachesOut(far, 80) || staging.reachesOut(near, 81) {
		t.Error("a default opens a denied network, or staging")
	}
	late := w.attachTo("late", in("s3", "app"))
	r.started(late)
	if !late.reachesOut(near, 81) {
		t.Error("a container that has started does not reach what it may")
	}
	for _, g := range mustList(t, groups) {
		if g.Name != "cron" {
			if err := groups.Delete(t.Context(), g.GUID); err != nil {
				t.Fatal(err)
			}
		}
	}
	eventually(t, "removed groups let nothing out", patience, func() bool { return !app.reachesOut(near, 80) && !other.reachesOut(near, 81) })
	if !echoes(c) {
		t.Error("an established connection ended")
	}
	if !plain.reachesOut(near, 81) {
		t.Error("a group that is still there does not hold any more")
	}
	for path, want := range map[string]string{
		"/force-asgs-for-container?container=" + app.key.Container: "updated container " + app.key.Container, "/force-asgs-for-container?container=none": "updated container none",
		"/force-orphaned-asgs-cleanup?container=x": "cleaned up ASGs for container x",
	} {
		if status, text := r.force(path); status != 200 || text != want {
			t.Errorf("%s: %d %q", path, status, text)
		}
	}
	if status, text := r.force("/force-asgs-for-container"); status != 400 || text != "no container specified" {
		t.Errorf("%d %q", status, text)
	}
}

func mustList(t *testing.T, g *policysql.SecurityGroups) []secgroup.Kept {
	t.Helper()
	list, err := g.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestRulesOfTheRuntimeHoldWithoutPolicyServer is about enable_asg_syncing false.
func TestRulesOfTheRuntimeHoldWithoutPolicyServer(t *testing.T) {
	w := newWorld(t)
	out := w.internet()
	out.listen(80)
	out.listen(81)
	store := w.policies()
	r := w.start(store, func(c *Config) { c.DenyNetworks.Running = []string{far.String() + "/32"} })
	rule := `{"protocol":1,"networks":[{"start":"203.0.113.2","end":"203.0.113.2"}],"ports":[{"start":80,"end":80}]}`
	free, freeApp, none := w.attachTo("a"), w.attachTo("a", in("s", "app")), w.attachTo("a", netOut(`[]`))
	some, bad := w.attachTo("a", netOut("["+rule+"]")), w.attachTo("a", netOut(`[{"protocol":77},`+rule+`,{"protocol":2}]`))
	for _, x := range []struct {
		name           string
		m              *member
		to80, to81, to bool
	}{{"without rules", free, true, true, true}, {"without rules, running", freeApp, true, true, false}, {"with an empty list", none, false, false, false},
		{"with a rule", some, true, false, false}, {"with bad rules too", bad, true, false, false}} {
		r.started(x.m)
		if a, b, c := x.m.reachesOut(near, 80), x.m.reachesOut(near, 81), x.m.reachesOut(far, 80); a != x.to80 || b != x.to81 || c != x.to {
			t.Errorf("a container %s: %v %v %v", x.name, a, b, c)
		}
	}
	_, text := r.get(r.cfg.debugAddress(), "/health")
	if !hasText(text, "egress rules of") || !hasText(text, "rule 1") || !hasText(text, "rule 3") {
		t.Errorf("health does not name the bad rules: %s", text)
	}
	for _, path := range []string{"/force-asgs-for-container?container=c1", "/force-orphaned-asgs-cleanup"} {
		if status, text := r.force(path); status != 405 || text != "ASG syncing has been disabled administratively" {
			t.Errorf("%s: %d %q", path, status, text)
		}
	}
}

// deafGroups is a feed whose server does not answer.
type deafGroups struct{}

func (deafGroups) Watch(context.Context, secgroup.Ask) (secgroup.Update, error) {
	return secgroup.Update{}, fault.Unavailablef("connection refused")
}

func TestSecurityGroupsOutliveTheServer(t *testing.T) {
	w := newWorld(t)
	w.internet().listen(80)
	store, groups := w.groupsOf()
	r := w.start(store, syncing)
	w.create(groups, secgroup.Record{Name: "web", Rules: tcpTo("203.0.113.2", "80"), RunningSpaces: []string{"s1"}})
	app := w.attachTo("web", in("s1", "app"))
	r.started(app)
	if !app.reachesOut(near, 80) {
		t.Fatal("the group does not hold")
	}
	r.stop()
	w.groups = deafGroups{}
	r = w.start(store, syncing)
	again := w.attachTo("web", in("s1", "app"))
	r.started(again)
	if !app.reachesOut(near, 80) || !again.reachesOut(near, 80) {
		t.Error("what was known before the restart does not hold")
	}
	unknown := w.attachTo("web", in("s2", "app"))
	status, text := r.force("/force-policy-poll-cycle?container=" + unknown.key.Container)
	if status != 503 || !hasText(text, "its security groups are not known: policy-server: connection refused") || unknown.reachesOut(near, 80) {
		t.Errorf("a container of a space that nobody told of: %d %s", status, text)
	}
	if status, text := r.force("/force-asgs-for-container?container=" + unknown.key.Container); status != 500 || !hasText(text, "failed to update asgs for container "+unknown.key.Container) {
		t.Errorf("%d %s", status, text)
	}
	r.stop()
	// Half a file is no file.
	path := filepath.Join(w.state, groupsFile)
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, b[:len(b)-2], 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	r = w.start(store, syncing)
	if _, text := r.get(r.cfg.debugAddress(), "/health"); !hasText(text, "security groups: none are known") {
		t.Errorf("health: %s", text)
	}
	if !app.reachesOut(near, 80) {
		t.Error("the kernel did not keep the rules that were there")
	}
}

// TestNothingIsOpenBeforeSecurityGroupsAreKnown: on a host that never had any.
func TestNothingIsOpenBeforeSecurityGroupsAreKnown(t *testing.T) {
	w := newWorld(t)
	w.internet().listen(80)
	w.groups = deafGroups{}
	store := w.policies()
	app := w.attachTo("web", in("s1", "app"), netOut(`[{"protocol":0,"networks":[{"start":"0.0.0.0","end":"255.255.255.255"}]}]`))
	r := w.start(store, syncing)
	if status, text := r.force("/force-policy-poll-cycle?container=" + app.key.Container); status != 503 || !hasText(text, "security groups") {
		t.Errorf("%d %s", status, text)
	}
	if app.reachesOut(near, 80) {
		t.Error("it is open")
	}
	if _, text := r.get(r.cfg.debugAddress(), "/health"); !hasText(text, "security groups: none are known: containers reach nothing outside the overlay") {
		t.Errorf("health: %s", text)
	}
}

// TestABadSecurityGroupHarmsNoOther: what can be read of it holds, and so do the others.
func TestABadSecurityGroupHarmsNoOther(t *testing.T) {
	w := newWorld(t)
	w.internet().listen(80)
	store := w.policies()
	records := []secgroup.Record{
		{GUID: "g1", Name: "bad", Rules: `[{"protocol":"tcp","destination":"203.0.113.2"},{"protocol":"tcp","destination":"203.0.113.2","ports":"80"},{"protocol":"x"}]`, RunningDefault: true},
		{GUID: "g2", Name: "worse", Rules: `no list`, RunningDefault: true}, {GUID: "g3", Name: "IPv6", Rules: `[{"protocol":"all","destination":"fd00::/8"}]`, RunningDefault: true},
	}
	w.groups = fixedGroups(records)
	r := w.start(store, syncing)
	app := w.attachTo("web", in("s1", "app"))
	r.started(app)
	if !app.reachesOut(near, 80) || app.reachesOut(near, 81) {
		t.Error("the good rule does not hold, or more than it")
	}
	_, text := r.get(r.cfg.debugAddress(), "/health")
	for _, want := range []string{"g1", "rule 1", "rule 3", "g2", "g3"} {
		if !hasText(text, want) {
			t.Errorf("health does not name %s: %s", want, text)
		}
	}
}

// fixedGroups tells always the same.
type fixedGroups []secgroup.Record

func (f fixedGroups) Watch(ctx context.Context, a secgroup.Ask) (secgroup.Update, error) {
	u := secgroup.Update{Count: len(f), Sum: secgroup.Sum(f)}
	u.Revision.Epoch, u.Revision.Counter = "e", 1
	if a.Since == u.Revision && a.Sum == u.Sum {
		<-ctx.Done()
		return u, ctx.Err()
	}
	u.Full, u.Groups = true, f
	return u, nil
}
