package tlsproxy

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestNothingLeaks: connections of all kinds, containers that come and go, and the program itself leave no file and no goroutine.
func TestNothingLeaks(t *testing.T) {
	w := newWorld(t)
	web, stays := w.attach(), w.attach(standard)
	stays.listen(8080, echo)
	files := func() int {
		list, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	life := func() {
		r := w.start()
		r.listens(stays)
		for range 3 {
			api := w.attach(standard)
			r.listens(api)
			var many sync.WaitGroup
			for n := range 8 {
				many.Go(func() {
					for range 5 {
						switch n {
						case 0:
							web.tries(api) // which does not listen
						case 1:
							if c, err := web.reach(stays, 61443); err == nil {
								io.WriteString(c, "garbage\r\n\r\n")
								c.Close()
							}
						case 2:
							if c, err := web.reach(stays, 61443); err == nil {
								c.SetLinger(0)
								c.Close()
							}
						default:
							if err := web.tries(stays); err != nil {
								t.Error(err)
							}
						}
					}
				})
			}
			many.Wait()
			api.detach()
		}
		c, _ := web.mustSecure(stays) // one is open when the program ends
		r.stop()
		c.Close()
	}
	life() // what is made once and kept
	before, goroutines := files(), runtime.NumGoroutine()
	life()
	testkit.Within(t, patience, func() string {
		// The test keeps the namespaces of its three containers.
		if f, g := files(), runtime.NumGoroutine(); f > before+3 || g > goroutines {
			return fmt.Sprintf("%d files and %d goroutines, before %d and %d", f, g, before, goroutines)
		}
		return ""
	})
}
