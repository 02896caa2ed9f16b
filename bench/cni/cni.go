// Package cni measures silk-cni: whole processes of ADD and DEL, one at a time and ten at once, beside the kernel's own
// minimum for the same objects, the start of an empty Go program, and the standard plugins ptp and host-local.
//
// ptp runs twice: as it is by default, which is what ours is held against, and with ipMasq. Only then does it do what silk-cni
// does: a container that it has attached can reach the world.
package cni

import (
	"context"
	"fmt"
	"math"

	"code.cloudfoundry.org/silk/bench"
)

const (
	rounds  = 60 // of each figure, one at a time
	bursts  = 12 // of ten at once
	atOnce  = 10
	massive = 100 // DELs at once
)

// levels are how many containers the host has when the last one is measured.
var levels = []int{1, 100, 250}

// Run measures.
func Run(ctx context.Context, r *bench.Report) error {
	b, err := setUp(ctx)
	if err != nil {
		return err
	}
	defer b.close()
	for _, level := range levels {
		if err := b.fill(level - 1); err != nil {
			return err
		}
		one, err := b.oneAtATime()
		if err != nil {
			return fmt.Errorf("one at a time with %d containers: %w", level, err)
		}
		ten, err := b.tenAtOnce()
		if err != nil {
			return fmt.Errorf("%d at once with %d containers: %w", atOnce, level, err)
		}
		report(r, level, one, ten)
	}
	if err := b.lastToFirst(r); err != nil {
		return err
	}
	if err := b.edge(ctx, r); err != nil {
		return err
	}
	return b.massDelete(r)
}

// report adds the figures of one level.
func report(r *bench.Report, level int, one, ten map[string][]float64) {
	at := func(figure string) string { return fmt.Sprintf("cni.%s.at%d", figure, level) }
	none := math.NaN()
	add, raw, empty, ptp := bench.Median(one["add"]), bench.Median(one["raw"]), bench.Median(one["empty"]), bench.Median(one["plain add"])
	r.Add(at("kernel.p50"), raw, "ms", none)
	r.Add(at("empty.p50"), empty, "ms", none)
	limit := 3.0*raw + empty + 1
	r.Bar(at("add.p50"), add, "ms", limit, "<= 3.0 x kernel + empty program + 1 ms", add <= limit)
	r.Add(at("add.p99"), bench.Percentile(one["add"], 0.99), "ms", bench.Percentile(one["plain add"], 0.99))
	r.RatioAtMost(at("add.p50.ptp"), add, "ms", ptp, 0.35)
	r.Add(at("add.p50.ptp_with_masquerade"), add, "ms", bench.Median(one["ptp add"]))
	r.RatioAtMost(at("del.p50.ptp"), bench.Median(one["del"]), "ms", bench.Median(one["plain del"]), 1.2)
	r.Add(at("del.p99"), bench.Percentile(one["del"], 0.99), "ms", bench.Percentile(one["plain del"], 0.99))

	add10, raw10, empty10 := bench.Median(ten["add"]), bench.Median(ten["raw"]), bench.Median(ten["empty"])
	r.Add(at("kernel.10.p50"), raw10, "ms", none)
	r.Add(at("empty.10.p50"), empty10, "ms", none)
	limit10 := 2.0*raw10 + empty10
	r.Bar(at("add.10.p50"), add10, "ms", limit10, "<= 2.0 x kernel at 10 + 10 empty programs", add10 <= limit10)
	r.Add(at("add.10.p99"), bench.Percentile(ten["add"], 0.99), "ms", bench.Percentile(ten["plain add"], 0.99))
	r.Add(at("del.10.p50"), bench.Median(ten["del"]), "ms", bench.Median(ten["plain del"]))
	r.Add(at("del.10.p99"), bench.Percentile(ten["del"], 0.99), "ms", bench.Percentile(ten["plain del"], 0.99))
}
