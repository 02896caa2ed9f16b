// Package bench measures Silk against baselines taken in the same run and writes what it found.
//
// Each room has a package below this one whose Run measures its figures; bench/silkbench runs them. Machines are noisy:
// interleave a figure with its baseline, take medians of several rounds, and judge ratios.
package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Result is one figure. Its name starts with the room: "cni.add.p50".
type Result struct {
	Name     string   `json:"name"`
	Value    float64  `json:"value"`
	Unit     string   `json:"unit"`
	Baseline *float64 `json:"baseline,omitempty"` // measured in the same run, in the same unit
	Ratio    *float64 `json:"ratio,omitempty"`    // value / baseline
	Bar      string   `json:"bar,omitempty"`      // what is promised: "<= 5 ms", ">= 1 x pgbench"
	Holds    *bool    `json:"holds,omitempty"`
}

// Report collects results.
type Report struct{ Results []Result }

// Add records a figure without a promise. baseline NaN means none.
func (r *Report) Add(name string, value float64, unit string, baseline float64) {
	r.add(name, value, unit, baseline, "", nil)
}

// Bar records a figure with a promise and whether it was kept.
func (r *Report) Bar(name string, value float64, unit string, baseline float64, bar string, holds bool) {
	r.add(name, value, unit, baseline, bar, &holds)
}

// AtMost records a figure that must not exceed limit, in its own unit.
func (r *Report) AtMost(name string, value float64, unit string, limit float64) {
	r.Bar(name, value, unit, math.NaN(), fmt.Sprintf("<= %.4g %s", limit, unit), value <= limit)
}

// RatioAtMost records a figure that must not exceed factor times its baseline.
func (r *Report) RatioAtMost(name string, value float64, unit string, baseline, factor float64) {
	r.Bar(name, value, unit, baseline, fmt.Sprintf("<= %.4g x baseline", factor), value <= factor*baseline)
}

// RatioAtLeast records a figure that must reach factor times its baseline.
func (r *Report) RatioAtLeast(name string, value float64, unit string, baseline, factor float64) {
	r.Bar(name, value, unit, baseline, fmt.Sprintf(">= %.4g x baseline", factor), value >= factor*baseline)
}

func (r *Report) add(name string, value float64, unit string, baseline float64, bar string, holds *bool) {
	res := Result{Name: name, Value: value, Unit: unit, Bar: bar, Holds: holds}
	if !math.IsNaN(baseline) {
		ratio := value / baseline
		res.Baseline, res.Ratio = &baseline, &ratio
	}
	r.Results = append(r.Results, res)
}

// Table writes the results for people.
func (r *Report) Table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "figure\tvalue\tunit\tbaseline\tratio\tbar\tholds\t")
	for _, x := range r.Results {
		base, ratio, holds := "", "", ""
		if x.Baseline != nil {
			base, ratio = fmt.Sprintf("%.4g", *x.Baseline), fmt.Sprintf("%.3f", *x.Ratio)
		}
		if x.Holds != nil {
			holds = map[bool]string{true: "yes", false: "NO"}[*x.Holds]
		}
		fmt.Fprintf(t, "%s\t%.4g\t%s\t%s\t%s\t%s\t%s\t\n", x.Name, x.Value, x.Unit, base, ratio, x.Bar, holds)
	}
	return t.Flush()
}

// Save writes the results to path as a JSON list.
func (r *Report) Save(path string) error {
	b, err := json.MarshalIndent(r.Results, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

// Median returns the middle of the samples, NaN of none.
func Median(samples []float64) float64 { return Percentile(samples, 0.5) }

// Percentile returns the smallest sample that at least the fraction p (0 to 1) of the samples do not exceed, NaN of none.
func Percentile(samples []float64, p float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(samples))
	i := int(math.Ceil(p*float64(len(s)))) - 1
	return s[min(max(i, 0), len(s)-1)]
}

// Millis returns how long f took, in milliseconds.
func Millis(f func() error) (float64, error) {
	start := time.Now()
	err := f()
	return float64(time.Since(start)) / 1e6, err
}

// Memory returns a size from /proc/PID/status, such as VmRSS, in MiB.
func Memory(pid int, key string) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == key+":" {
			kib, err := strconv.ParseFloat(f[1], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("no %s in /proc/%d/status", key, pid)
}
