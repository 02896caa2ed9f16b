package policyhttp

import (
	"fmt"
	"strings"
)

// Partial is the error that Client.Watch returns beside an update, and Client.List beside policies, when the server sent rules that cannot be
// used. What is returned is good and everything else: it may be enforced.
type Partial struct {
	Skipped []error // why each was left out, which names it
}

// Error counts the rules and gives the reasons of the first three.
func (p *Partial) Error() string {
	const shown = 3
	var b strings.Builder
	fmt.Fprintf(&b, "%d policies of the answer cannot be used", len(p.Skipped))
	for i, err := range p.Skipped[:min(len(p.Skipped), shown)] {
		fmt.Fprintf(&b, "%s %v", map[bool]string{true: ":", false: ";"}[i == 0], err)
	}
	if len(p.Skipped) > shown {
		b.WriteString("; ...")
	}
	return b.String()
}
