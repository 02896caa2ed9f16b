package policyagent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"code.cloudfoundry.org/silk/flow"
	"code.cloudfoundry.org/silk/internal/httpjson"
)

// followers bounds how many requests for records are served at a time.
const followers = 8

// followWrite is how long a follower may take for what it is sent.
const followWrite = 10 * time.Second

// flowQuery is what a request for records asks for.
type flowQuery struct {
	follow, denied, ended bool
	group                 string
	since                 time.Time
	after                 string // id of a record: only those after it
}

// parseFlowQuery reads it: follow and denied are true or absent, group is a policy group, since an RFC 3339 time, after
// the id of a record.
func parseFlowQuery(r *http.Request) (q flowQuery, err error) {
	v := r.URL.Query()
	flag := func(name string, into *bool) {
		if s := v.Get(name); s != "" && err == nil {
			if *into, err = strconv.ParseBool(s); err != nil {
				err = fmt.Errorf("%s=%.20q: expected true or false", name, s)
			}
		}
	}
	flag("follow", &q.follow)
	flag("denied", &q.denied)
	flag("ended", &q.ended)
	q.group, q.after = v.Get("group"), v.Get("after")
	if s := v.Get("since"); s != "" && err == nil {
		if q.since, err = time.Parse(time.RFC3339Nano, s); err != nil {
			err = fmt.Errorf("since=%.40q: expected a time such as 2026-01-02T15:04:05Z", s)
		}
	}
	return q, err
}

// wants reports whether a record is asked for.
func (q flowQuery) wants(r *flow.Record) bool {
	return (!q.denied || r.Verdict == flow.Denied) && (!q.ended || r.Event != flow.Begun || r.EndUnknown) &&
		(q.group == "" || r.FromGroup == q.group || r.ToGroup == q.group) && r.Time.After(q.since)
}

// serveFlows answers with the records that are kept, a JSON object each line, and with follow goes on with those that come.
func (f *flowLog) serveFlows(places chan struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		q, err := parseFlowQuery(r)
		if err != nil {
			httpjson.WriteError(w, http.StatusBadRequest, err.Error())
			return
		}
		if !httpjson.Enter(places, 0, w, r) {
			return
		}
		defer func() { <-places }()
		w.Header().Set("Content-Type", "application/x-ndjson")
		f.stream(w, r, q)
	}
}

func (f *flowLog) stream(w http.ResponseWriter, r *http.Request, q flowQuery) {
	control := http.NewResponseController(w)
	control.SetReadDeadline(time.Time{}) // else the listener's limit for requests ends it
	buf, line, next := make([]flow.Record, 0, 256), []byte(nil), f.recent.after(q.after)
	for begun := false; ; begun = true {
		records, to, missed, more := f.recent.since(next, buf)
		first := to - uint64(len(records))
		next, line = to, line[:0]
		if missed > 0 && (begun || q.after != "") {
			line = append(line, fmt.Sprintf("{\"event\":\"missed\",\"records\":%d}\n", missed)...)
		}
		for i := range records {
			if q.wants(&records[i]) {
				line = append(line, `{"id":"`...)
				line = append(append(line, f.recent.id(first+uint64(i))...), `",`...)
				body := len(line)
				line = flow.Lines.Append(line, f.site, &records[i])
				line = append(line[:body], line[body+1:]...) // its own brace
			}
		}
		if len(line) > 0 || !begun {
			control.SetWriteDeadline(time.Now().Add(followWrite))
			if _, err := w.Write(line); err != nil || control.Flush() != nil {
				return
			}
		}
		if more == nil {
			continue
		}
		if !q.follow {
			return
		}
		select {
		case <-more:
		case <-r.Context().Done():
			return
		}
	}
}

// flowSwitch is the switch of the flow log.
type flowSwitch struct {
	C2C    *bool `json:"c2c"`
	Egress *bool `json:"egress"`
}

// serveSwitch turns parts of the flow log on and off: PUT with {"c2c":true,"egress":false}, either of which may be left out. Every method answers with
// how it stands.
func (a *agent) serveSwitch(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPut {
		var s flowSwitch
		d := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10))
		d.DisallowUnknownFields()
		if err := d.Decode(&s); err != nil {
			httpjson.WriteError(w, http.StatusBadRequest, fmt.Sprintf("decode request: %v: expected {\"c2c\":true,\"egress\":true}", err))
			return
		}
		a.turnLog(s)
	}
	a.mu.Lock()
	c2c, egress := a.logging, a.loggingEgress
	a.mu.Unlock()
	httpjson.Write(w, http.StatusOK, flowSwitch{&c2c, &egress})
}

// turnLog turns the switches that s has. The next pass, which begins at once, makes the kernel log accordingly.
func (a *agent) turnLog(s flowSwitch) {
	a.mu.Lock()
	was := [2]bool{a.logging, a.loggingEgress}
	if s.C2C != nil {
		a.logging = *s.C2C
	}
	if s.Egress != nil {
		a.loggingEgress = *s.Egress
	}
	now := [2]bool{a.logging, a.loggingEgress}
	a.mu.Unlock()
	if was != now {
		a.log.Info("flow log switched", "c2c", now[0], "egress", now[1])
		a.enforcement.Kick()
	}
}
