package nat

import (
	"fmt"
	"slices"
	"strings"
)

// state is what the kernel has of ours.
type state struct {
	generation uint32
	table      bool
	others     bool // something else is in the table
	sets       map[string]setState
	chain      objectState
	rules      []string // of the chain, in order
}

// objectState says whether an object is there, and as it should be.
type objectState uint8

const (
	absent objectState = iota
	right
	wrong // of our name but of another kind
)

type setState struct {
	is    objectState
	spans []span
}

// change is one request to the kernel. Its text is the nft command.
type change struct {
	verb, object, name string
	spans              []span // of elements
	vtep               string // of the rule
}

const (
	setDeclaration   = "type ipv4_addr; flags interval;"
	chainDeclaration = "type nat hook postrouting priority 100; policy accept;"
)

// ruleText is the rule as nft(8) has it.
func ruleText(vtep string) string {
	return fmt.Sprintf("ip saddr @%s ip daddr != @%s ip daddr != @%s oifname != %q masquerade", setLocal, setLocal, setNoMasquerade, vtep)
}

// String returns the nft command.
func (c change) String() string {
	text := c.verb + " " + c.object + " inet " + Table
	if c.name != "" {
		text += " " + c.name
	}
	if c.verb != "add" {
		return text
	}
	switch c.object {
	case "set":
		text += " { " + setDeclaration + " }"
	case "chain":
		text += " { " + chainDeclaration + " }"
	case "element":
		var list []string
		for _, s := range c.spans {
			list = append(list, s.String())
		}
		text += " { " + strings.Join(list, ", ") + " }"
	case "rule":
		text += " " + ruleText(c.vtep)
	}
	return text
}

// plan returns the changes that lead from s to w, in an order that the kernel accepts.
func plan(w wish, s state) []change {
	var out []change
	add := func(verb, object, name string) { out = append(out, change{verb: verb, object: object, name: name}) }
	if !s.table {
		add("add", "table", "")
	}
	names := []string{setLocal, setNoMasquerade}
	chain, rules := s.chain, s.rules
	spoilt := slices.ContainsFunc(names, func(n string) bool { return s.sets[n].is == wrong })
	if chain == wrong || spoilt && chain == right { // a set cannot go while a rule looks into it
		add("flush", "chain", chainName)
		rules = nil
		if chain == wrong {
			add("delete", "chain", chainName)
			chain = absent
		}
	}
	for _, n := range names {
		have := s.sets[n]
		if have.is == wrong {
			add("delete", "set", n)
		}
		if have.is != right {
			add("add", "set", n)
			have = setState{}
		}
		if slices.Equal(have.spans, w.sets[n]) {
			continue
		}
		if len(have.spans) > 0 {
			add("flush", "set", n)
		}
		if len(w.sets[n]) > 0 {
			out = append(out, change{verb: "add", object: "element", name: n, spans: w.sets[n]})
		}
	}
	if chain == absent {
		add("add", "chain", chainName)
	}
	if !slices.Equal(rules, []string{w.rule}) {
		if len(rules) > 0 {
			add("flush", "chain", chainName)
		}
		out = append(out, change{verb: "add", object: "rule", name: chainName, vtep: w.vtep})
	}
	return out
}

// planRemoval returns the changes after which nothing of ours is left.
func planRemoval(s state) []change {
	var out []change
	if s.chain != absent {
		out = append(out, change{verb: "flush", object: "chain", name: chainName}, change{verb: "delete", object: "chain", name: chainName})
	}
	for _, n := range []string{setLocal, setNoMasquerade} {
		if s.sets[n].is != absent {
			out = append(out, change{verb: "delete", object: "set", name: n})
		}
	}
	if s.table && !s.others {
		out = append(out, change{verb: "delete", object: "table"})
	}
	return out
}
