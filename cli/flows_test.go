package cli_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/cli"
)

const (
	refusedFlow = `{"id":"e-1","time":"2026-11-21T12:00:00.000005000Z","event":"denied","verdict":"denied","scope":"c2c","reason":"no policy web -> api tcp 81","packet":{"direction":"ingress","allowed":false,"src_ip":"10.255.7.9","dst_ip":"10.255.30.2","src_port":40000,"dst_port":81,"protocol":"TCP","mark":"0x1","icmp_type":0,"icmp_code":0},"source":{"group":"web","tag":"0001"},"destination":{"container_id":"c","group":"api\u001b[2J"}}`
	endedFlow   = `{"id":"e-2","time":"2026-11-21T12:02:00.000005000Z","event":"ended","verdict":"accepted","scope":"egress","reason":"a security group","packet":{"direction":"egress","allowed":true,"src_ip":"10.255.30.2","dst_ip":"8.8.8.8","src_port":0,"dst_port":0,"protocol":"ICMP","mark":"","icmp_type":8,"icmp_code":0},"source":{"group":""},"destination":{"group":""},"begun":"2026-11-21T12:00:00Z","ended":"2026-11-21T12:00:01Z","duration_seconds":1.5,"sent":{"packets":2,"bytes":168},"received":{"packets":2,"bytes":20000}}`
)

// flowsAgent answers as vxlan-policy-agent does.
type flowsAgent struct {
	mu    sync.Mutex
	on    string
	asked []string
	flows func(w http.ResponseWriter, r *http.Request)
}

// serve returns its port.
func (a *flowsAgent) serve(t *testing.T) string {
	m := http.NewServeMux()
	m.HandleFunc("/flow-log", func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		a.mu.Lock()
		defer a.mu.Unlock()
		if r.Method == http.MethodPut {
			a.on = string(b)
		}
		io.WriteString(w, a.on)
	})
	m.HandleFunc("/flows", func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		a.asked = append(a.asked, r.URL.RawQuery)
		a.mu.Unlock()
		a.flows(w, r)
	})
	s := httptest.NewServer(m)
	t.Cleanup(s.Close)
	_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
	return port
}

func TestFlows(t *testing.T) {
	a := &flowsAgent{on: `{"c2c":false,"egress":false}`, flows: func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "%s\n{\"event\":\"missed\",\"records\":3}\n%s\n", refusedFlow, endedFlow)
	}}
	port := a.serve(t)
	code, out, errs := run(t, "flows", "--port", port, "--denied", "--group", "web", "--since", "2026-01-02T15:04:05Z")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if code != 0 || len(lines) != 3 || !strings.Contains(lines[1], "denied    tcp    web 10.255.7.9:40000              api?[2J 10.255.30.2:81            no policy web -> api tcp 81") ||
		!strings.Contains(lines[2], "ended     icmp   10.255.30.2                       8.8.8.8                           a security group (type 8 code 0); 1.5s, 168 B sent, 20 kB received") {
		t.Errorf("status %d:\n%s", code, out)
	}
	if !strings.Contains(errs, "silk flows log on") || !strings.Contains(errs, "3 records were missed") {
		t.Errorf("told: %s", errs)
	}
	if want := []string{"denied=true&group=web&since=2026-01-02T15%3A04%3A05Z"}; !slices.Equal(a.asked, want) {
		t.Errorf("asked for %q", a.asked)
	}
	if _, out, _ = run(t, "flows", "--port", port, "-o", "json"); out != refusedFlow+"\n"+endedFlow+"\n" {
		t.Errorf("json: %s", out)
	}
	for args, want := range map[string]string{
		"log": "between containers off", "log on": "between containers on, to the outside on", "log off --only c2c": "between containers off, to the outside off", "log maybe": "expected on or off",
		"log on --only x": "expected c2c or egress", "--since yesterday": "expected an age", "-o xml": "expected table or json",
	} {
		if _, out, errs := run(t, append([]string{"flows", "--port", port}, strings.Fields(args)...)...); !strings.Contains(out+errs, want) {
			t.Errorf("%s: %s%s", args, out, errs)
		}
	}
	if code, _, errs := run(t, "flows", "--port", "1"); code != 1 || !strings.Contains(errs, "is it running") {
		t.Errorf("without an agent: status %d, %s", code, errs)
	}
}

// TestFlowsFollow: a stream that ends is taken up where it was, until the user ends it.
func TestFlowsFollow(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	a := &flowsAgent{on: `{"c2c":true}`}
	a.flows = func(w http.ResponseWriter, r *http.Request) {
		switch q := r.URL.Query(); {
		case q.Get("after") == "":
			fmt.Fprintln(w, refusedFlow)
		case q.Get("after") == "e-1":
			fmt.Fprintln(w, endedFlow)
			w.(http.Flusher).Flush()
			time.AfterFunc(50*time.Millisecond, cancel)
			<-r.Context().Done()
		default:
			t.Errorf("asked for %s", r.URL.RawQuery)
		}
	}
	var out, errs strings.Builder
	if code := cli.Run(ctx, []string{"flows", "--port", a.serve(t), "-f", "-o", "json"}, &out, &errs); code != 0 {
		t.Errorf("status %d: %s", code, errs.String())
	}
	if out.String() != refusedFlow+"\n"+endedFlow+"\n" {
		t.Errorf("shown: %s", out.String())
	}
	if !strings.HasPrefix(a.asked[0], "follow=true&since=") {
		t.Errorf("asked for %q", a.asked)
	}
}
