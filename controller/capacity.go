package controller

import "code.cloudfoundry.org/silk/lease"

// steps are the percentages of the range at which the controller warns.
var steps = [...]int{70, 85, 95}

// slack is by how many percent use must fall below a step before reaching it is news again.
const slack = 2

// alarm remembers the highest step that the use of a range has reached, so that each crossing is told once. Use that
// swings about a step is one crossing.
type alarm struct{ step int }

// look takes the present use and returns the step that has been reached since the last look, 0 if none.
func (a *alarm) look(used, size uint64) int {
	reached, left := 0, 0
	for _, s := range steps {
		if used*100 >= uint64(s)*size {
			reached = s
		}
		if used*100 >= uint64(s-slack)*size {
			left = s
		}
	}
	switch {
	case reached > a.step:
		a.step = reached
		return reached
	case left < a.step:
		a.step = left
	}
	return 0
}

// kinds are the two halves of the range, each with an alarm of its own.
var kinds = [...]lease.Kind{lease.Block, lease.Single}
