package testkit

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOutline(t *testing.T) {
	got := outline("table inet silk {\n\tset a {\n\t\ttype mark\n\t\telements = { 1,\n\t\t\t2 }\n\t}\n\n\tchain in {\n\t\ttype filter hook input priority filter\n\t\tmeta mark @a drop\n\t}\n\n\tchain out {\n\t}\n}\n")
	if d := cmp.Diff([]string{"table inet silk {", "set a {", "chain in {..", "chain out {"}, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}
