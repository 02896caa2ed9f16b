package policyhttp

import (
	"iter"
	"net/http"
	"strconv"

	"code.cloudfoundry.org/silk/identity"
	"code.cloudfoundry.org/silk/policy"
)

// chunk is how much of a list is written at once.
const chunk = 64 << 10

// writeRules sends a list of n rules, in chunks so that tens of thousands of policies never stand in memory as text.
func writeRules(w http.ResponseWriter, s shape, rules iter.Seq[policy.Rule], n int) {
	if s.version == v0 {
		n = 0
		for r := range rules {
			if s.shows(&r) {
				n++
			}
		}
	}
	w.Header().Set("Content-Type", "application/json")
	b := make([]byte, 0, min(chunk+4*ruleSize, (n+1)*ruleSize))
	b = append(b, `{"total_policies":`...)
	b = strconv.AppendInt(b, int64(n), 10)
	b = append(b, `,"policies":[`...)
	written, comma := false, false
	for r := range rules {
		if !s.shows(&r) {
			continue
		}
		if comma {
			b = append(b, ',')
		}
		comma = true
		if b = s.appendRule(b, &r); len(b) < chunk {
			continue
		}
		if _, err := w.Write(b); err != nil {
			return // the caller has gone
		}
		written, b = true, b[:0]
	}
	b = append(b, "]}"...)
	if !written {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	}
	w.Write(b)
}

// writeTags sends groups with their tags.
func writeTags(w http.ResponseWriter, ts []identity.Tagged, length int) {
	b := make([]byte, 0, 16+80*len(ts))
	b = append(b, `{"tags":[`...)
	for i, t := range ts {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendTagged(b, t, length)
	}
	writeJSON(w, http.StatusOK, append(b, "]}"...))
}

func appendTagged(b []byte, t identity.Tagged, length int) []byte {
	b = append(b, `{"id":`...)
	b = appendString(b, string(t.Group))
	b = append(b, `,"tag":"`...)
	b = appendTag(b, t.Tag, length)
	b = append(b, `","type":`...)
	b = appendString(b, t.Kind)
	return append(b, '}')
}

func writeJSON(w http.ResponseWriter, status int, b []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	w.Write(b)
}
