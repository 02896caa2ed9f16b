package tlsproxy

import (
	"os"
	"path/filepath"
	"testing"

	"code.cloudfoundry.org/silk/internal/testkit"
)

// TestPortsStayWhileARecordCannotBeRead: who cannot read what a container wants may not take it for nothing.
func TestPortsStayWhileARecordCannotBeRead(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	api, web := w.attach(standard), w.attach()
	api.listen(8080, echo)
	r.listens(api)
	c, _ := web.mustSecure(api)
	files, err := filepath.Glob(filepath.Join(w.dir.Path(), "*"+api.key.Container+"*"))
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	whole, err := os.ReadFile(files[0])
	if err == nil {
		err = os.WriteFile(files[0], nil, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	other := w.attach(standard)
	r.listens(other) // it has looked since
	if err := said(c, "hello"); err != nil {
		t.Errorf("a connection of before: %v", err)
	}
	if fresh, _, err := web.secure(api); err != nil {
		t.Errorf("a connection meanwhile: %v", err)
	} else {
		fresh.Close()
	}
	testkit.Until(t, patience, "it is told", func() bool { _, text := r.get("/health"); return hasText(text, "1 records cannot be read") })
	if err := os.WriteFile(files[0], whole, 0o600); err != nil {
		t.Fatal(err)
	}
	r.listens(w.attach(standard))
	if err := said(c, "hello"); err != nil {
		t.Errorf("a connection of before, when the record is back: %v", err)
	}
}
