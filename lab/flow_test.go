package lab_test

import (
	"fmt"
	"regexp"
	"testing"

	"code.cloudfoundry.org/silk/lab"
)

// TestFlowsAreShownByName: the host that a connection goes to says who began it, on whatever host, and by which policy, or for lack of which.
func TestFlowsAreShownByName(t *testing.T) {
	t.Parallel()
	l, s := policed(t, lab.Options{Hosts: 2})
	allow(t, l, "web", "api")
	if out, err := l.Output(t.Context(), "host2", "silk", "flows", "log", "on"); err != nil {
		t.Fatalf("silk flows log on: %v\n%s", err, out)
	}
	shown := []*regexp.Regexp{
		regexp.MustCompile(`(?m) begun +tcp +web 10\.255\.\d+\.\d+:\d+ +api 10\.255\.\d+\.\d+:8080 +policy web -> api tcp 8080$`),
		regexp.MustCompile(`(?m) denied +tcp +api 10\.255\.\d+\.\d+:\d+ +api 10\.255\.\d+\.\d+:8080 +no policy api -> api tcp 8080$`),
	}
	await(t, "flows of c1 and c2 are shown at c4's host", func() error {
		connect(t, s, "c1", "c4", lab.HTTPPort) // what becomes of them is what flows say
		connect(t, s, "c2", "c4", lab.HTTPPort)
		out, err := l.Output(t.Context(), "host2", "silk", "flows", "--group", "api")
		for _, x := range shown {
			if err == nil && !x.Match(out) {
				err = fmt.Errorf("nothing like %v in\n%s", x, out)
			}
		}
		return err
	})
}
