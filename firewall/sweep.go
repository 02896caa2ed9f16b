package firewall

import (
	"cmp"
	"net/netip"
	"slices"

	"code.cloudfoundry.org/silk/secgroup"
)

// rect is what a rule says for one range of addresses and one of ports.
type rect struct {
	first, last netip.Addr
	line
}

// line is a range of ports (or what stands for them, see Span).
type line struct {
	from, to uint16
	log      bool
}

func good(d secgroup.Range) bool {
	return d.First.Is4() && d.Last.Is4() && d.First.Compare(d.Last) <= 0
}

// reduce returns the spans of rules, in no order. It is not ok if they are too many, or take too long to find.
func reduce(rules []secgroup.Rule) ([]Span, bool) {
	s := sweep{limit: MaxSpans, most: maxWork}
	for _, p := range []secgroup.Protocol{secgroup.TCP, secgroup.UDP, secgroup.ICMP, secgroup.All} {
		if !s.run(p, rects(rules, p, MaxSpans)) {
			return nil, false
		}
	}
	return s.out, true
}

// rects returns what rules say of packets of a protocol, where All stands for those that have no other, in order. There is at most one more than limit.
func rects(rules []secgroup.Rule, p secgroup.Protocol, limit int) []rect {
	var out []rect
	var buf []line
	for i := range rules {
		r := &rules[i]
		if buf = lines(buf[:0], r, p); len(buf) == 0 {
			continue
		}
		if out == nil {
			out = make([]rect, 0, len(rules)-i)
		}
		for _, d := range r.Destinations {
			if !good(d) {
				continue
			}
			for _, l := range buf {
				if out = append(out, rect{d.First, d.Last, l}); len(out) > limit {
					return out
				}
			}
		}
	}
	return out
}

// lines adds what a rule says of packets of a protocol that go where it says.
func lines(out []line, r *secgroup.Rule, p secgroup.Protocol) []line {
	switch {
	case r.Protocol == secgroup.All && p == secgroup.All:
		return append(out, line{0, 255, r.Log})
	case r.Protocol == secgroup.All:
		return append(out, line{0, 65535, r.Log})
	case p == secgroup.All && r.Protocol != secgroup.TCP && r.Protocol != secgroup.UDP && r.Protocol != secgroup.ICMP:
		return append(out, line{uint16(r.Protocol), uint16(r.Protocol), r.Log})
	case r.Protocol != p:
		return out
	case p == secgroup.ICMP:
		return messages(out, r)
	}
	for _, x := range r.Ports {
		if x.First <= x.Last {
			out = append(out, line{x.First, x.Last, r.Log})
		}
	}
	return out
}

// messages is lines for ICMP.
func messages(out []line, r *secgroup.Rule) []line {
	types, codes := [2]int16{r.Type, r.Type}, [2]int16{r.Code, r.Code}
	if r.Type == secgroup.Any {
		types = [2]int16{0, 255}
	}
	if r.Code == secgroup.Any {
		codes = [2]int16{0, 255}
	}
	if types[0] < 0 || types[1] > 255 || codes[0] < 0 || codes[1] > 255 {
		return out
	}
	if codes == [2]int16{0, 255} {
		return append(out, line{uint16(types[0]) << 8, uint16(types[1])<<8 | 255, r.Log})
	}
	for t := types[0]; t <= types[1]; t++ {
		at := uint16(t)<<8 | uint16(codes[0])
		out = append(out, line{at, at, r.Log})
	}
	return out
}

// sweep turns rectangles that overlap into spans that do not: it goes through the addresses at which anything begins or ends, and paints what holds
// from there on. What it finds depends only on which packets are allowed and logged, not on how the rules are written.
type sweep struct {
	out   []Span
	limit int    // of spans
	work  int    // so far
	most  int    // at most
	spare []Span // memory for the next step
	lines []line // and for paint
}

// maxWork bounds what the sweep of a list looks at, in rectangles and lines at an address: some 50 ms.
const maxWork = 4_000_000

// run adds the spans of one protocol. It is not ok when there are too many, or too much to look at.
func (s *sweep) run(p secgroup.Protocol, all []rect) bool {
	if len(all) > s.limit {
		return false
	}
	if len(all) == 0 {
		return true
	}
	byFirst := make([]int, len(all))
	bounds := make([]netip.Addr, 0, 2*len(all))
	for i, r := range all {
		byFirst[i] = i
		bounds = append(bounds, r.first)
		if next := r.last.Next(); next.IsValid() {
			bounds = append(bounds, next)
		}
	}
	slices.SortFunc(byFirst, func(a, b int) int { return cmp.Or(all[a].first.Compare(all[b].first), cmp.Compare(a, b)) })
	slices.SortFunc(bounds, netip.Addr.Compare)
	bounds = slices.Compact(bounds)
	var active []int // in the order of the rules
	var open []Span  // without ends: they go on for as long as their lines are there
	for _, at := range bounds {
		s.work += len(active) + 1
		active = slices.DeleteFunc(active, func(i int) bool { return all[i].last.Compare(at) < 0 })
		for len(byFirst) > 0 && all[byFirst[0]].first == at {
			i, _ := slices.BinarySearch(active, byFirst[0])
			active, byFirst = slices.Insert(active, i, byFirst[0]), byFirst[1:]
		}
		open = s.step(p, at, open, s.paint(p, all, active))
		if s.work > s.most || len(s.out)+len(open) > s.limit {
			return false
		}
	}
	end := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	for _, x := range open {
		x.Last = end
		s.out = append(s.out, x)
	}
	return true
}

// step goes on from an address with other lines: spans whose lines are still there stay open. Both are sorted.
func (s *sweep) step(p secgroup.Protocol, at netip.Addr, open []Span, lines []line) []Span {
	next, was := s.spare[:0], open[:0]
	for _, l := range lines {
		for len(open) > 0 && open[0].From < l.from {
			s.close(open[0], at)
			open = open[1:]
		}
		if len(open) > 0 && (line{open[0].From, open[0].To, open[0].Log}) == l {
			next, open = append(next, open[0]), open[1:]
			continue
		}
		next = append(next, Span{First: at, Protocol: p, From: l.from, To: l.to, Log: l.log})
	}
	for _, x := range open {
		s.close(x, at)
	}
	s.spare = was
	return next
}

func (s *sweep) close(x Span, at netip.Addr) {
	x.Last = at.Prev()
	s.out = append(s.out, x)
}

// paint returns the lines of rectangles: sorted, none has what another has, and where several rectangles have a port the first one says whether it is logged.
// When that is too much to look at it stops: see run.
func (s *sweep) paint(p secgroup.Protocol, all []rect, active []int) []line {
	lines := s.lines[:0]
	for _, i := range active {
		if s.work++; s.work > s.most {
			break
		}
		r, n := all[i].line, len(lines)
		switch {
		case n == 0 || lines[n-1].to < r.from:
			lines = add(lines, r)
		case n == 1 && lines[0].from <= r.from && r.to <= lines[0].to:
		default:
			lines = cover(lines, r)
			s.work += n
		}
	}
	s.lines = lines
	if p == secgroup.ICMP {
		return square(lines)
	}
	return lines
}

// cover adds what a line has and the others do not.
func cover(lines []line, r line) []line {
	out := make([]line, 0, len(lines)+2)
	from, rest := int(r.from), true // what of r begins there is still to be added
	for _, l := range lines {
		if rest && int(l.from) > from {
			if to := min(int(r.to), int(l.from)-1); from <= to {
				out = add(out, line{uint16(from), uint16(to), r.log})
			}
		}
		out = add(out, l)
		from = max(from, int(l.to)+1)
		rest = from <= int(r.to)
	}
	if rest && from <= int(r.to) {
		out = add(out, line{uint16(from), r.to, r.log})
	}
	return out
}

// add appends a line, or makes the last one longer if they touch.
func add(lines []line, l line) []line {
	if n := len(lines) - 1; n >= 0 && lines[n].log == l.log && int(lines[n].to)+1 == int(l.from) {
		lines[n].to = l.to
		return lines
	}
	return append(lines, l)
}

// square cuts lines of ICMP into such as are a range of types times a range of codes.
func square(lines []line) []line {
	out := make([]line, 0, len(lines))
	for _, l := range lines {
		from := int(l.from)
		for from <= int(l.to) {
			to := int(l.to)
			switch {
			case from>>8 == to>>8: // one type
			case from&255 != 0:
				to = from | 255
			case to&255 != 255:
				to = to>>8<<8 - 1
			}
			out = append(out, line{uint16(from), uint16(to), l.log})
			from = to + 1
		}
	}
	return out
}
