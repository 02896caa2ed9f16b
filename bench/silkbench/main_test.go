package main

import (
	"strings"
	"testing"
)

func TestChoose(t *testing.T) {
	all := make([]string, len(rooms))
	for i, r := range rooms {
		all[i] = r.name
	}
	for list, want := range map[string]string{"": strings.Join(all, ","), "cni": "cni", "cni,lease": "lease,cni", "cnii": "error", "cni,": "error"} {
		chosen, err := choose(list)
		var names []string
		for _, r := range chosen {
			names = append(names, r.name)
		}
		got := strings.Join(names, ",")
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("-only %q measures %q, %v, want %q", list, got, err, want)
		}
	}
}
