package cni

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"code.cloudfoundry.org/silk/bench"
	"code.cloudfoundry.org/silk/endpoint"
)

// plugin runs a plugin as a whole process, in the namespace of the calling thread, and returns how long it took in
// milliseconds.
func (b *bed) plugin(name, command string, c *container) (float64, error) {
	in, err := os.Open(b.config(name))
	if err != nil {
		return 0, err
	}
	defer in.Close()
	out, err := os.Create(filepath.Join(b.dir, "out-"+c.id))
	if err != nil {
		return 0, err
	}
	defer out.Close()
	program := "silk-cni"
	if name == "ptp" || name == "plain" {
		program = "ptp"
	}
	cmd := exec.Cmd{
		Path: filepath.Join(b.bin, program), Args: []string{program}, Stdin: in, Stdout: out, Stderr: out,
		Env: []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + c.id, "CNI_NETNS=" + c.path, "CNI_IFNAME=eth0", "CNI_PATH=" + b.bin, "PATH=" + os.Getenv("PATH")},
	}
	ms, err := bench.Millis(cmd.Run)
	if err != nil {
		text, _ := os.ReadFile(out.Name())
		err = fmt.Errorf("%s %s %s: %w: %s", program, command, c.id, err, bytes.TrimSpace(text))
	}
	return ms, err
}

func (b *bed) empty() (float64, error) {
	cmd := exec.Cmd{Path: filepath.Join(b.bin, "empty"), Args: []string{"empty"}, Env: []string{}}
	return bench.Millis(cmd.Run)
}

// fill attaches containers until every host has n.
func (b *bed) fill(n int) error {
	for _, h := range []*host{b.silk, b.ptp, b.plain, b.raw} {
		for ; h.attached < n; h.attached++ {
			c := h.containers[h.attached]
			if err := h.on(1, func(int) error {
				if h == b.raw {
					_, err := rawAttach(c)
					return err
				}
				_, err := b.plugin(h.name, "ADD", c)
				return err
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// figure is one thing that is measured on a host: a preparation that is undone afterwards, or the undoing.
type figure struct {
	name string
	host *host
	run  func(c *container) (float64, error)
}

// figures in the order that every round takes them: what an ADD makes the DEL after it removes.
func (b *bed) figures() []figure {
	return []figure{
		{"empty", b.silk, func(*container) (float64, error) { return b.empty() }},
		{"raw", b.raw, rawAttach},
		{"add", b.silk, func(c *container) (float64, error) { return b.plugin("silk", "ADD", c) }},
		{"ptp add", b.ptp, func(c *container) (float64, error) { return b.plugin("ptp", "ADD", c) }},
		{"plain add", b.plain, func(c *container) (float64, error) { return b.plugin("plain", "ADD", c) }},
		{"del", b.silk, func(c *container) (float64, error) { return b.plugin("silk", "DEL", c) }},
		{"ptp del", b.ptp, func(c *container) (float64, error) { return b.plugin("ptp", "DEL", c) }},
		{"plain del", b.plain, func(c *container) (float64, error) { return b.plugin("plain", "DEL", c) }},
		{"", b.raw, rawDetach},
	}
}

// oneAtATime measures every figure in turn, round after round.
func (b *bed) oneAtATime() (map[string][]float64, error) { return b.measure(b.figures(), rounds, 1) }

// tenAtOnce measures ten of every figure at once, except ptp with ipMasq, which then takes the better part of a second.
func (b *bed) tenAtOnce() (map[string][]float64, error) {
	figures := slices.DeleteFunc(b.figures(), func(f figure) bool { return f.host == b.ptp })
	return b.measure(figures, bursts, atOnce)
}

func (b *bed) measure(figures []figure, rounds, n int) (map[string][]float64, error) {
	samples := map[string][]float64{}
	for range rounds {
		for _, f := range figures {
			took := make([]float64, n)
			err := f.host.on(n, func(i int) (err error) {
				took[i], err = f.run(f.host.containers[f.host.attached+i])
				return err
			})
			if err != nil {
				return nil, err
			}
			samples[f.name] = append(samples[f.name], took...)
		}
	}
	return samples, nil
}

// lastToFirst compares the last container that a host takes with the first, in turns: this machine may get slower meanwhile. It also tells
// what an ADD and a DEL together cost the daemon, which tells silk-cni the network and must not be kept busy by containers.
func (b *bed) lastToFirst(r *bench.Report) error {
	var figures []figure
	for _, h := range []*host{b.fresh, b.silk} {
		for _, command := range []string{"ADD", "DEL"} {
			figures = append(figures, figure{h.name + command, h, func(c *container) (float64, error) { return b.plugin(h.name, command, c) }})
		}
	}
	before, err := b.fresh.daemon.CPU()
	if err != nil {
		return err
	}
	samples, err := b.measure(figures, rounds, 1)
	if err != nil {
		return err
	}
	after, err := b.fresh.daemon.CPU()
	if err != nil {
		return err
	}
	r.Add("cni.daemon_cpu", (after-before)/rounds, "ms/ADD+DEL", math.NaN())
	r.RatioAtMost(fmt.Sprintf("cni.add.p50.at%d_to_first", b.silk.attached+1), bench.Median(samples["silkADD"]), "ms", bench.Median(samples["freshADD"]), 1.2)
	return nil
}

// massDelete removes a hundred containers at once and looks, right after the last process has ended, for what is left.
func (b *bed) massDelete(r *bench.Report) error {
	doomed := slices.Clone(b.silk.containers[:massive])
	var took time.Duration
	start := make(chan time.Time, massive)
	err := b.silk.on(massive, func(i int) error {
		start <- time.Now()
		_, err := b.plugin("silk", "DEL", doomed[i])
		return err
	})
	took = time.Since(<-start)
	if err != nil {
		return err
	}
	left, err := endpoint.Containers(b.silk.ns)
	if err != nil {
		return err
	}
	if want := b.silk.attached - massive; len(left) != want {
		return errors.New(fmt.Sprint("devices left after mass DEL: ", len(left), ", want ", want))
	}
	r.AtMost("cni.del.100_at_once", float64(took)/1e6, "ms", 1000)
	return nil
}
