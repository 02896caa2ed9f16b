package policysql

import (
	"errors"
	"testing"

	"code.cloudfoundry.org/silk/fault"
)

func TestParseStamp(t *testing.T) {
	const base = 1767323045000000000 // 2026-01-02 03:04:05 UTC
	for text, want := range map[string]int64{
		"2026-01-02 03:04:05":           base,
		"2026-01-02 03:04:05.123456":    base + 123456000,
		"2026-01-02T03:04:05.5Z":        base + 500000000,
		"2026-01-02 03:04:05.1+02:00":   base + 100000000, // the zone is not looked at, as the deployed server does
		"2026-01-02 03:04:05 +0000 UTC": base,
		"1969-12-31 23:59:59":           0,
		"9999-12-31 23:59:59":           0,
	} {
		if got, err := parseStamp(text); err != nil || got != want {
			t.Errorf("parseStamp(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "now", "2026-13-02 03:04:05", "0000-00-00 00:00:00", "1767322985", "2026-01-02"} {
		if got, err := parseStamp(text); !errors.Is(err, fault.Invalid) {
			t.Errorf("parseStamp(%q) = %d, %v, want an Invalid fault", text, got, err)
		}
	}
}

func FuzzParseStamp(f *testing.F) {
	for _, s := range []string{"", "2026-01-02 03:04:05", "2026-01-02T03:04:05.123456789Z", "9999-12-31 23:59:59.999999", "-001-01-01 00:00:00", "2026-01-02 03:04:05."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got, err := parseStamp(s); got < 0 || err != nil && (got != 0 || !errors.Is(err, fault.Invalid)) {
			t.Fatalf("parseStamp(%q) = %d, %v", s, got, err)
		}
	})
}
