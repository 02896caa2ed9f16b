package policyhttp

import (
	"code.cloudfoundry.org/silk/internal/plainjson"
	"code.cloudfoundry.org/silk/policy"
)

// plainPolicies is decodePolicies for nearly all bodies that have nothing wrong with them: a twelfth of what a policy cost the server was encoding/json.
// What it does not take, for whatever reason, decodePolicies judges.
func plainPolicies(body []byte, v version) (ps []policy.Policy, ok bool) {
	lists := 0
	ok = plainjson.Each(body, func(name string, list []byte) bool {
		lists++
		return name == "policies" && lists == 1 && plainjson.Elements(list, func(item []byte) bool {
			var w wireItem
			if !w.plain(item) {
				return false
			}
			p, err := w.judge(v)
			ps = append(ps, p)
			return err == nil
		})
	})
	return ps, ok && len(ps) > 0
}

// plain reads an item that has the members of a policy, each at most once, and no others.
func (w *wireItem) plain(b []byte) bool {
	d := &w.Destination
	var seen members
	return plainjson.Each(b, func(name string, v []byte) bool {
		switch name {
		case "source":
			return seen.first(0) && plainjson.Each(v, func(name string, v []byte) bool {
				return name == "id" && seen.first(1) && plainText(v, &w.Source.ID)
			})
		case "destination":
			return seen.first(2) && plainjson.Each(v, func(name string, v []byte) bool {
				switch name {
				case "id":
					return seen.first(3) && plainText(v, &d.ID)
				case "protocol":
					return seen.first(4) && plainText(v, &d.Protocol)
				case "port":
					return seen.first(5) && plainInt(v, &d.Port)
				case "ports":
					return seen.first(6) && plainjson.Each(v, func(name string, v []byte) bool {
						return name == "start" && seen.first(7) && plainInt(v, &d.Ports.Start) || name == "end" && seen.first(8) && plainInt(v, &d.Ports.End)
					})
				}
				return false
			})
		}
		return false
	})
}

// members are those that an object was seen to have.
type members uint

// first reports whether a member is seen for the first time.
func (m *members) first(n int) bool {
	bit := members(1) << n
	was := *m & bit
	*m |= bit
	return was == 0
}

func plainText(v []byte, to *string) (ok bool) {
	*to, ok = plainjson.Text(v)
	return ok
}

func plainInt(v []byte, to *int) (ok bool) {
	*to, ok = plainjson.Int(v)
	return ok
}
