package controller

import (
	"slices"
	"testing"
)

func TestEachCrossingIsToldOnce(t *testing.T) {
	var a alarm
	for _, c := range []struct {
		used uint64
		told int
		step int
	}{
		{0, 0, 0}, {699, 0, 0}, {700, 70, 70}, {701, 0, 70}, {699, 0, 70}, {700, 0, 70}, // swings about the step
		{960, 95, 95}, {949, 0, 95}, {929, 0, 85}, {950, 95, 95}, // fell far enough to be news again
		{1000, 0, 95}, {100, 0, 0}, {850, 85, 85},
	} {
		if told := a.look(c.used, 1000); told != c.told || a.step != c.step {
			t.Errorf("at %d of 1000: told %d at step %d, want %d at %d", c.used, told, a.step, c.told, c.step)
		}
	}
	var small alarm
	var told []int
	for used := range uint64(4) {
		told = append(told, small.look(used, 3))
	}
	if want := []int{0, 0, 0, 95}; !slices.Equal(told, want) {
		t.Errorf("in a range of three: %v, want %v", told, want)
	}
}
