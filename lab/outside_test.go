package lab_test

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lab"
)

// TestOutside: containers reach both addresses of a lab's outside, also after it was killed.
func TestOutside(t *testing.T) {
	l := up(t, lab.Options{Hosts: 2, Containers: 1, Outside: true})
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	for _, kill := range []bool{true, false} {
		s, err := l.AwaitWhole(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Edge) != 4 {
			t.Fatalf("edge is %+v", s.Edge)
		}
		for _, p := range s.Edge {
			if !p.OK {
				t.Errorf("%s to %s: %s", p.From, p.To, p.Error)
			}
		}
		if kill {
			if err := l.Kill(ctx, "outside"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := l.Kill(ctx, "nowhere"); !errors.Is(err, fault.NotFound) {
		t.Errorf("kill of what is not there: %v", err)
	}
}

// TestPortsOfTheHostAreGivenOnce: the second container that wants a port of a host is refused before it is made.
func TestPortsOfTheHostAreGivenOnce(t *testing.T) {
	l := up(t, lab.Options{Hosts: 1, Containers: -1})
	if _, err := l.AddTo(t.Context(), "a", "host1", "", lab.Port{Host: 9080, Container: lab.HTTPPort}); err != nil {
		t.Fatal(err)
	}
	_, err := l.AddTo(t.Context(), "b", "host1", "", lab.Port{Host: 9080, Container: lab.HTTPPort})
	if !errors.Is(err, fault.Conflict) || !strings.Contains(err.Error(), "leads to a already") {
		t.Errorf("the port was given twice: %v", err)
	}
}

func TestEdgeAsText(t *testing.T) {
	s := lab.Status{Policy: lab.PolicyRequired, Containers: []lab.Container{{Name: "c1", Host: "host1", Group: "web", Address: netip.MustParseAddr("10.255.80.2")}},
		Edge: []lab.Path{{From: "c1", To: "10.0.0.200", OK: true, Time: 240 * time.Microsecond}, {From: "c1", To: "10.0.0.201", Deny: true},
			{From: "outside", To: "10.0.0.11:9080:8080", Via: "c1", Error: "timeout"}}}
	var b strings.Builder
	if err := s.Write(&b); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"         10.0.0.200  10.0.0.201\n", "c1(web)  ok 0.2ms    deny\n", "10.0.0.11:9080 -> c1(web):8080  FAIL\n"} {
		if !strings.Contains(b.String(), line) {
			t.Errorf("%q is not in\n%s", line, b.String())
		}
	}
}

func FuzzParsePort(f *testing.F) {
	for _, s := range []string{"9080:8080", "0:1", "1:65536", "1", ":", "-1:2", "1:2:3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := lab.ParsePort(s)
		if err != nil {
			if !errors.Is(err, fault.Invalid) {
				t.Fatalf("%v is not fault.Invalid", err)
			}
			return
		}
		if again, err := lab.ParsePort(p.String()); err != nil || again != p {
			t.Fatalf("%q is %v, which is read as %v, %v", s, p, again, err)
		}
	})
}
