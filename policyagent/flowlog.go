package policyagent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"code.cloudfoundry.org/silk/firewall"
	"code.cloudfoundry.org/silk/flow"
	"code.cloudfoundry.org/silk/internal/kernel"
	"code.cloudfoundry.org/silk/internal/reconcile"
)

// Records may wait a little: who reads many at a time is woken less often. An end must not overtake the beginning of its connection, which the
// kernel, too, keeps for up to 50 ms, so it waits longer.
const (
	packetPause = 50 * time.Millisecond
	endPause    = 500 * time.Millisecond
	quietCheck  = time.Second     // between looks whether the log, once switched off, has no more ends to wait for
	openCheck   = 5 * time.Minute // between looks whether the kernel still knows the connections whose ends are waited for
)

// flowLog tells of connections: what rules log and the kernel says of their ends, as records. It never makes a packet or the enforcement wait;
// what it cannot take in time is lost and counted.
type flowLog struct {
	ns      *kernel.NS
	group   uint16
	sysctls *kernel.Sysctls
	site    flow.Site
	format  flow.Format
	begun   bool      // beginnings have lines of their own
	file    *flowFile // nil: none
	recent  *flowRecent
	log     *slog.Logger
	kick    chan struct{} // the switch was turned
	changed func()        // called when hearing begins or ends

	mu       sync.Mutex
	wanted   bool
	hearing  bool
	join     *flow.Log
	timeouts kernel.FlowTimeouts
	emit     func(*flow.Record)
	line     []byte
	known    knownNames
	counts   flowCounts
	err      error // why nothing is heard
}

// flowCounts are what the metrics tell.
type flowCounts struct {
	records [3]uint64 // by flow.Event
	packets uint64    // logged, but lost before they were read
	ends    uint64    // likewise of ends
}

// newFlowLog returns a log that is off.
func newFlowLog(ns *kernel.NS, cfg Config, sysctls *kernel.Sysctls, log *slog.Logger) *flowLog {
	f := &flowLog{ns: ns, group: cfg.logGroup(), sysctls: sysctls, log: log, begun: cfg.FlowLog.Begun, recent: newFlowRecent(), kick: make(chan struct{}, 1)}
	f.site = flow.Site{IP: cfg.FlowLog.HostIP, GUID: cfg.FlowLog.HostGUID}
	if f.site.IP == "" {
		f.site.IP = cfg.name()
	}
	f.format, _ = flow.ParseFormat(cfg.FlowLog.Format) // judged by Validate
	if cfg.FlowLog.File != "" {
		f.file = newFlowFile(cfg.FlowLog.File, log)
	}
	f.join = flow.New(flow.Options{Since: time.Now()})
	f.emit = f.take
	return f
}

// take keeps a record for who asks and writes its line. mu is held.
func (f *flowLog) take(r *flow.Record) {
	f.counts.records[min(int(r.Event), len(f.counts.records)-1)]++
	f.recent.add(r)
	if f.file != nil && f.format.Writes(r, f.begun) {
		f.line = f.format.Append(f.line[:0], f.site, r)
		f.file.add(f.line)
	}
}

// want turns the log on or off, and reports whether it hears: only then is there a point in rules that log.
func (f *flowLog) want(on bool) (hears bool) {
	f.mu.Lock()
	changed := on != f.wanted
	f.wanted = on
	hears = f.hearing
	f.mu.Unlock()
	if changed {
		select {
		case f.kick <- struct{}{}:
		default:
		}
	}
	return on && hears
}

// state returns whether the log is wanted, and how many ends it waits for.
func (f *flowLog) state() (wanted bool, open int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.wanted, f.join.Open()
}

// run hears whenever the log is on, until ctx ends.
func (f *flowLog) run(ctx context.Context) error {
	var file sync.WaitGroup
	defer file.Wait()
	writing, stop := context.WithCancel(context.WithoutCancel(ctx)) // what was read last is written too
	defer stop()
	if f.file != nil {
		file.Go(func() { f.file.run(writing) })
	}
	failures := 0
	for ctx.Err() == nil {
		if wanted, _ := f.state(); !wanted {
			select {
			case <-ctx.Done():
			case <-f.kick:
			}
			continue
		}
		began := time.Now()
		err := f.hear(ctx)
		if ctx.Err() != nil { // the rules stay as they are
			break
		}
		if f.heard(false, err); err == nil {
			continue
		}
		if failures++; time.Since(began) > time.Minute {
			failures = 1
		}
		pause := reconcile.Backoff(time.Second, time.Minute, failures)
		f.log.Error("flow log hears nothing", "error", err, "retry_in", pause)
		reconcile.Sleep(ctx, pause)
	}
	return nil
}

// heard notes whether the log hears, and why not.
func (f *flowLog) heard(hearing bool, err error) {
	f.mu.Lock()
	f.hearing, f.err = hearing, err
	f.mu.Unlock()
	f.changed()
}

// hear opens the sockets and reads them until ctx ends, the log is off and nothing is waited for, or something fails.
func (f *flowLog) hear(ctx context.Context) error {
	f.prepare()
	packets, err := kernel.OpenPacketLog(f.ns, f.group)
	if err != nil {
		return err
	}
	defer packets.Close()
	ends, err := kernel.OpenFlowEnds(f.ns)
	if err != nil {
		return err
	}
	defer ends.Close()
	f.heard(true, nil)
	f.log.Info("flow log on", "group", f.group)
	ctx, stop := context.WithCancel(ctx)
	var readers sync.WaitGroup
	failed := make(chan error, 2)
	defer func() { stop(); packets.Close(); ends.Close(); readers.Wait() }()
	readers.Go(func() { failed <- f.readPackets(ctx, packets) })
	readers.Go(func() { failed <- f.readEnds(ctx, ends) })
	check := time.NewTicker(quietCheck)
	defer check.Stop()
	looked, missed := time.Now(), uint64(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-f.kick:
		case <-check.C:
		}
		wanted, open := f.state()
		if !wanted && open == 0 {
			f.log.Info("flow log off")
			return nil
		}
		if lost := ends.Lost(); open > 0 && (lost != missed && time.Since(looked) > time.Minute || time.Since(looked) > openCheck) {
			looked, missed = time.Now(), lost
			if err := f.retain(); err != nil {
				f.log.Warn("connections could not be compared with the kernel's", "error", err)
			}
		}
	}
}

// prepare makes the kernel count what connections carry and note when they begin. Without that records lack it.
func (f *flowLog) prepare() {
	set := func() error {
		timeouts := kernel.ReadFlowTimeouts()
		f.mu.Lock()
		f.timeouts = timeouts
		f.mu.Unlock()
		return errors.Join(f.sysctls.Set("net/netfilter/nf_conntrack_acct", "1"), f.sysctls.Set("net/netfilter/nf_conntrack_timestamp", "1"))
	}
	var err error
	if f.ns == nil {
		err = set()
	} else {
		err = f.ns.Do(set)
	}
	if err != nil {
		f.log.Warn("the flow log will not tell what connections carry", "error", err)
	}
}

// readPackets takes what rules log.
func (f *flowLog) readPackets(ctx context.Context, packets *kernel.PacketLog) error {
	before := uint64(0)
	for {
		err := packets.Read(func(p kernel.LoggedPacket) {
			verdict, scope, detail, ours := flow.ParsePrefix(p.Prefix)
			packet, whole := flow.ParsePacket(p.Data)
			if !ours || !whole {
				return
			}
			f.mu.Lock()
			f.join.Packet(flow.Logged{Time: wall(), Verdict: verdict, Scope: scope, Detail: detail, Mark: p.Mark, Packet: packet}, f.emit)
			f.mu.Unlock()
		})
		lost := packets.Lost()
		f.mu.Lock()
		f.counts.packets += lost - before
		f.mu.Unlock()
		before = lost
		f.publish()
		if err != nil || !reconcile.Sleep(ctx, packetPause) {
			return closedIsNone(err)
		}
	}
}

// readEnds takes the ends of connections, each some time after it was heard of.
func (f *flowLog) readEnds(ctx context.Context, ends *kernel.FlowEnds) error {
	var heard []kernel.FlowEnd
	before := uint64(0)
	for {
		err := ends.Read(func(e kernel.FlowEnd) { heard = append(heard, e) })
		alive := err == nil && reconcile.Sleep(ctx, endPause)
		lost := ends.Lost()
		f.mu.Lock()
		f.counts.ends += lost - before
		for i := range heard {
			f.end(&heard[i])
		}
		f.mu.Unlock()
		before, heard = lost, heard[:0]
		if cap(heard) > 1<<16 {
			heard = nil
		}
		f.publish()
		if !alive {
			return closedIsNone(err)
		}
	}
}

// end takes one. mu is held.
func (f *flowLog) end(e *kernel.FlowEnd) {
	now := e.Ended
	if now.IsZero() {
		now = wall()
	}
	f.join.End(flow.End{
		Time: now, Packet: packetOf(e), Mark: e.Mark, Sent: flow.Traffic(e.Sent), Heard: flow.Traffic(e.Heard), Start: e.Begun, Last: f.timeouts.LastPacket(*e),
	}, f.emit)
}

func packetOf(e *kernel.FlowEnd) flow.Packet {
	return flow.Packet{Protocol: e.Protocol, Source: e.From, Destination: e.Server}
}

func closedIsNone(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// retain gives up connections that the kernel does not know any more.
func (f *flowLog) retain() error {
	asked := wall()
	alive := map[flow.Packet]struct{}{}
	if err := kernel.LiveFlows(f.ns, func(e kernel.FlowEnd) { alive[packetOf(&e)] = struct{}{} }); err != nil {
		return err
	}
	f.mu.Lock()
	f.join.Retain(wall(), asked, func(p flow.Packet) bool { _, there := alive[p]; return there }, f.emit)
	f.mu.Unlock()
	f.publish()
	return nil
}

// publish wakes who waits for records.
func (f *flowLog) publish() {
	f.recent.wake()
	if f.file != nil {
		f.file.wake()
	}
}

// trouble says why the log does not work, "" if it does. It is for the health.
func (f *flowLog) trouble() string {
	f.mu.Lock()
	err := f.err
	f.mu.Unlock()
	if err == nil && f.file != nil {
		err = f.file.failure()
	}
	if err == nil {
		return ""
	}
	return fmt.Sprintf("flow log: %v", err)
}

// logging returns what rules are to log, as the switches are. mu is held.
func (a *agent) logs() firewall.Log {
	return firewall.Log{C2C: a.logging, Egress: a.loggingEgress, Denied: a.cfg.DeniedLogs, UDP: a.cfg.UDPLogs}
}
