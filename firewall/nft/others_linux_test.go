package nft_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/firewall/nft"
	"code.cloudfoundry.org/silk/policy"
)

// Others' rules, as their programs leave them on a host.
const (
	docker = `iptables-nft -P FORWARD DROP; for c in DOCKER DOCKER-USER DOCKER-FORWARD DOCKER-CT DOCKER-BRIDGE; do iptables-nft -N $c; done
		iptables-nft -A FORWARD -j DOCKER-USER; iptables-nft -A FORWARD -j DOCKER-FORWARD; iptables-nft -A DOCKER-FORWARD -j DOCKER-CT
		iptables-nft -A DOCKER-FORWARD -i docker0 -j ACCEPT; iptables-nft -A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
		iptables-nft -t nat -N DOCKER; iptables-nft -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
		iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE`
	firewalld = `nft add table inet firewalld; nft 'add chain inet firewalld filter_FORWARD { type filter hook forward priority 10; policy accept; }'
		nft add rule inet firewalld filter_FORWARD ct state established,related accept
		nft add rule inet firewalld filter_FORWARD ct status dnat accept; nft add rule inet firewalld filter_FORWARD iifname lo accept
		nft add rule inet firewalld filter_FORWARD ct state invalid drop; nft add rule inet firewalld filter_FORWARD reject with icmpx type admin-prohibited`
	legacy = `iptables-legacy -P FORWARD DROP; iptables-legacy -A FORWARD -i docker0 -j ACCEPT; iptables-legacy -A FORWARD -p tcp --dport 22 -j DROP`
	// What kube-proxy has in iptables mode for one service with two backends.
	kubeProxy = `iptables-nft-restore --noflush <<'X'
*filter
:KUBE-FORWARD - [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
COMMIT
*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-A - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-A
-A KUBE-SVC-A ! -s 10.244.0.0/16 -d 10.96.0.10/32 -p tcp -m tcp --dport 443 -j KUBE-MARK-MASQ
-A KUBE-SVC-A -j KUBE-SEP-A
-A KUBE-SEP-A -s 10.244.0.5/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.244.0.5:6443
COMMIT
X`
	showOthers = "iptables-nft-save | sed '/^#/d; s/ \\[.*//'; iptables-legacy-save | sed '/^#/d; s/ \\[.*//'; nft list tables"
)

// TestBesideOthers: with Docker, firewalld, kube-proxy and both kinds of iptables on the host, what Check says is enough to make
// containers talk, no rule of theirs is touched, and what no policy allows is refused still.
func TestBesideOthers(t *testing.T) {
	for name, x := range map[string]struct{ rules, warning, remedy string }{
		"docker":     {docker, `chain "FORWARD" of nft table ip "filter" refuses`, "iptables-nft -I DOCKER-USER -i s-+ -j ACCEPT; iptables-nft -I DOCKER-USER -o s-+ -j ACCEPT"},
		"kube-proxy": {kubeProxy, "", ""},
		"firewalld": {firewalld, `chain "filter_FORWARD" of nft table inet "firewalld" refuses`,
			`nft insert rule inet firewalld filter_FORWARD iifname '"s-*"' accept; nft insert rule inet firewalld filter_FORWARD oifname '"s-*"' accept`},
		"legacy": {legacy, "policy of chain FORWARD of iptables-legacy is DROP", "iptables-legacy -I FORWARD -i s-+ -j ACCEPT; iptables-legacy -I FORWARD -o s-+ -j ACCEPT"},
		"nobody": {"true", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t, nft.Options{})
			for i, h := range f.w.Hosts {
				h.Shell(h.NS, x.rules)
				warnings, err := f.tables[i].Check(context.Background())
				if err != nil {
					t.Fatal(err)
				}
				if all := strings.Join(warnings, "\n"); x.warning == "" && all != "" || x.warning != "" && (len(warnings) != 1 || !strings.Contains(all, x.warning)) {
					t.Errorf("warnings %q, expected %q", all, x.warning)
				}
				h.Shell(h.NS, x.remedy)
				if warnings, err := f.tables[i].Check(context.Background()); len(warnings) > 0 || err != nil {
					t.Errorf("after the remedy: %q, %v", warnings, err)
				}
			}
			before := f.w.Hosts[0].Shell(f.w.Hosts[0].NS, showOthers)
			f.set(rule(1, 2, policy.TCP, 80, 80), rule(1, 2, policy.UDP, 50, 60))
			for host := range 2 {
				for _, p := range []struct {
					proto policy.Protocol
					port  uint16
				}{{policy.TCP, 80}, {policy.UDP, 55}} {
					packet := f.packet(1, host, 2, p.proto, p.port)
					f.arrives(0, host, packet, false)
					f.arrives(host, 0, f.answer(packet, host, 2), true)
				}
				f.isRefused(0, host, nft.NoPolicy, f.packet(1, host, 2, policy.TCP, 81), false)
			}
			if after := f.w.Hosts[0].Shell(f.w.Hosts[0].NS, showOthers); after != before {
				t.Errorf("rules of others changed:\n%s\nwere\n%s", after, before)
			}
		})
	}
}

// TestCheckRefusesRulesOnTags: an ip rule that looks at bits that carry tags would route by who sends.
func TestCheckRefusesRulesOnTags(t *testing.T) {
	h := newHost(t)
	table := h.open(nft.Options{})
	h.sh("ip rule add fwmark 0x10000/0xff0000 lookup 100")
	if _, err := table.Check(context.Background()); err != nil {
		t.Errorf("a rule on other bits: %v", err)
	}
	h.sh("ip rule add fwmark 0x80/0xff lookup 101 priority 5210")
	if _, err := table.Check(context.Background()); !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "5210: fwmark 0x80/0xff") {
		t.Errorf("a rule on our bits: %v", err)
	}
}
