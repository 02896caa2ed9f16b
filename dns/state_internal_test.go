package dns

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/registration"
)

// TestWhatWasAdvertisedIsRead: of a host with very many names as well, of which the file takes more than 16 MiB. Of a file that is torn it is
// what can be read; the file is put aside.
func TestWhatWasAdvertisedIsRead(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, advertisedFile)
	open := func() *state {
		s := openState(t.Context(), dir, slog.New(slog.DiscardHandler))
		if err := s.trouble(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(s.close)
		return s
	}
	long := strings.Repeat("very-long-part-of-a-name.", 8) + "apps.internal"
	var told []pair
	for i := range 70_000 {
		told = append(told, pair{registration.Name(fmt.Sprintf("n%05d.%s", i, long)), netip.AddrFrom4([4]byte{10, 255, byte(i >> 8), byte(i)})})
	}
	s := open()
	s.saveAdvertised(told)
	if st, err := os.Stat(file); err != nil || st.Size() <= 16<<20 {
		t.Fatalf("%v, %v: want more than 16 MiB", st, err)
	}
	if got, err := s.advertised(); err != nil || !slices.Equal(got, told) {
		t.Errorf("read %d of %d names: %v", len(got), len(told), err)
	}
	for _, cut := range []int64{1, 2, 1000, 10 << 20} {
		s.wrote = nil
		s.saveAdvertised(told)
		st, err := os.Stat(file)
		if err == nil {
			err = os.Truncate(file, st.Size()-cut)
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := s.advertised()
		if least := len(told) - int(cut)/200 - 2; err == nil || len(got) < least || !slices.Equal(got, told[:len(got)]) {
			t.Errorf("%d bytes cut off: read %d names, %v: want an error and at least %d of %d", cut, len(got), err, least, len(told))
		}
		if _, err := os.Stat(file + brokenFile); err != nil {
			t.Error(err)
		}
	}
}
