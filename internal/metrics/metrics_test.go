package metrics_test

import (
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"code.cloudfoundry.org/silk/internal/metrics"
)

// scrape returns the lines that c shows and that begin with one of the prefixes.
func scrape(t *testing.T, c prometheus.Collector, prefixes ...string) string {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(c); err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	promhttp.HandlerFor(r, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	var b strings.Builder
	for line := range strings.Lines(w.Body.String()) {
		for _, p := range prefixes {
			if strings.HasPrefix(line, p) {
				b.WriteString(line)
			}
		}
	}
	return b.String()
}

func TestRequestsAreCountedByTheirLabels(t *testing.T) {
	r := metrics.NewRequests("x_", "api")
	internal, external := r.Observe("internal"), r.Observe("external")
	internal("list", 200, time.Millisecond)
	internal("list", 200, time.Millisecond)
	internal("list", 503, time.Millisecond)
	external("", 200, time.Millisecond)
	want := `x_request_seconds_count{api="external",route="root"} 1
x_request_seconds_count{api="internal",route="list"} 3
x_requests_total{api="external",code="200",route="root"} 1
x_requests_total{api="internal",code="200",route="list"} 2
x_requests_total{api="internal",code="503",route="list"} 1
`
	if got := scrape(t, r, "x_requests_total", "x_request_seconds_count"); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// figures shows what a Scrape makes of a few values.
type figures struct{ at time.Time }

var (
	descAt = prometheus.NewDesc("x_at", "An instant.", nil, nil)
	descOn = prometheus.NewDesc("x_on", "A flag.", []string{"name"}, nil)
)

func (f figures) Describe(ch chan<- *prometheus.Desc) {
	ch <- descAt
	ch <- descOn
}

func (f figures) Collect(ch chan<- prometheus.Metric) {
	to := metrics.Scrape(ch)
	to.Time(descAt, f.at)
	to.Flag(descOn, true, "a")
	to.Flag(descOn, false, "b")
}

func TestTimesAreAbsentWhileUnknown(t *testing.T) {
	const flags = "x_on{name=\"a\"} 1\nx_on{name=\"b\"} 0\n"
	if got := scrape(t, figures{}, "x_"); got != flags {
		t.Errorf("got %q, want %q", got, flags)
	}
	if got := scrape(t, figures{time.UnixMilli(1500)}, "x_"); got != "x_at 1.5\n"+flags {
		t.Errorf("got %q, want x_at 1.5 too", got)
	}
}
