package lab

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/signal"
	"time"

	"code.cloudfoundry.org/silk/fault"
	"golang.org/x/sys/unix"
)

// Status measures the lab: it asks every daemon and lets every container connect to every other one.
func (l *Lab) Status(ctx context.Context) (Status, error) {
	a, err := l.call(ctx, message{Op: opStatus})
	if err != nil || a.Status == nil {
		return Status{}, err
	}
	return *a.Status, nil
}

// Add puts a container on a host, "" for the one with the fewest, and returns when it is attached.
func (l *Lab) Add(ctx context.Context, name, host string) error {
	_, err := l.call(ctx, message{Op: opAdd, Name: name, Host: host})
	return err
}

// AddTo is Add of a container in a policy group, "" for web, with mapped ports. It returns the container's address.
func (l *Lab) AddTo(ctx context.Context, name, host, group string, ports ...Port) (netip.Addr, error) {
	a, err := l.call(ctx, message{Op: opAdd, Name: name, Host: host, Group: group, Ports: ports})
	return a.Address, err
}

// AddHost adds a host, with a name of its own choice for "", and returns its name when it has a lease.
func (l *Lab) AddHost(ctx context.Context, name string) (string, error) {
	a, err := l.call(ctx, message{Op: opAdd, Name: name, Host: newHost})
	return a.Name, err
}

// Remove takes a container or a host away, a host with its containers and by way of silk-teardown, and returns when it
// is gone.
func (l *Lab) Remove(ctx context.Context, name string) error {
	_, err := l.call(ctx, message{Op: opRemove, Name: name})
	return err
}

// Kill ends, with SIGKILL, "controller", "policy-server", "outside", "supervisor", "keeper", "HOST/silk-daemon", "HOST/vxlan-policy-agent", a container's
// responder, or all of a host, its namespaces and its /run included, as a power cut would. Everything comes back.
func (l *Lab) Kill(ctx context.Context, name string) error {
	_, err := l.call(ctx, message{Op: opKill, Name: name})
	if name == roleSupervisor && errors.Is(err, io.EOF) { // it had no time to answer
		return l.gone(ctx)
	}
	return err
}

// gone returns when a supervisor that was killed accepts no more commands, which it does for a moment after its connections have ended: the next one would
// be lost with it. Whether another one is there by then makes no difference.
func (l *Lab) gone(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for errors.Is(l.ping(ctx), io.EOF) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// Partition cuts a host off the underlay without its noticing.
func (l *Lab) Partition(ctx context.Context, host string) error {
	_, err := l.call(ctx, message{Op: opPartition, Name: host})
	return err
}

// Heal undoes Partition.
func (l *Lab) Heal(ctx context.Context, host string) error {
	_, err := l.call(ctx, message{Op: opHeal, Name: host})
	return err
}

// Exec runs a command on a host, in a container, or beside the controller ("controller") and returns its exit status, 128 + N
// after signal N. The files are its standard input and outputs. SIGINT and SIGTERM that this process gets meanwhile are passed
// on; the command is killed when ctx ends.
func (l *Lab) Exec(ctx context.Context, where string, command []string, stdin, stdout, stderr *os.File) (int, error) {
	w, err := l.dial(ctx)
	if err != nil {
		return 0, err
	}
	defer w.close()
	defer context.AfterFunc(ctx, func() { w.c.SetDeadline(time.Unix(1, 0)) })()
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	done := make(chan struct{})
	passed := make(chan struct{})
	defer func() { signal.Stop(signals); close(done); <-passed }()
	m := message{Op: opExec, Name: where, Command: command}
	if t := os.Getenv("TERM"); t != "" {
		m.Env = append(m.Env, "TERM="+t)
	}
	err = w.send(m, stdin, stdout, stderr)
	go func() {
		defer close(passed)
		for {
			select {
			case <-done:
				return
			case sig := <-signals:
				if n, ok := sig.(unix.Signal); ok {
					w.send(message{Signal: int(n)})
				}
			}
		}
	}()
	if err != nil {
		return 0, ended(err)
	}
	a, err := w.answer()
	return a.Exit, err
}

// Output runs a command as Exec does and returns what it wrote to its standard output. An exit status other than 0 is an error
// that holds the end of its standard error.
func (l *Lab) Output(ctx context.Context, where string, command ...string) ([]byte, error) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	var outs [2][]byte
	var files [2]*os.File
	read := make(chan struct{}, 2)
	for i := range outs {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		files[i] = w
		go func() {
			outs[i], _ = io.ReadAll(r)
			r.Close()
			read <- struct{}{}
		}()
	}
	code, err := l.Exec(ctx, where, command, null, files[0], files[1])
	for _, f := range files {
		f.Close()
	}
	<-read
	<-read
	if err == nil && code != 0 {
		err = &ExitError{command[0], code, string(outs[1][max(0, len(outs[1])-512):])}
	}
	return outs[0], err
}

// call sends one request and reads its answer.
func (l *Lab) call(ctx context.Context, m message) (answer, error) {
	w, err := l.dial(ctx)
	if err != nil {
		return answer{}, err
	}
	defer w.close()
	defer context.AfterFunc(ctx, func() { w.c.SetDeadline(time.Unix(1, 0)) })()
	if err := w.send(m); err != nil {
		return answer{}, ended(err)
	}
	return w.answer()
}

// dial connects to the supervisor, one that is being started or that has to be.
func (l *Lab) dial(ctx context.Context) (*wire, error) {
	w, err := connect(l.dir)
	if err == nil || !errors.Is(err, fault.Unavailable) {
		return w, err
	}
	_, unlock, err := claim(ctx, l.dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := readJournal(l.dir); errors.Is(err, fs.ErrNotExist) { // taken down since
		return nil, errors.Join(fault.NotFoundf("no lab in %s", l.dir), removeLab(l.dir))
	}
	if err := l.ensure(ctx); err != nil {
		return nil, err
	}
	return connect(l.dir)
}

// ping asks for a sign of life, which takes at most 5 s.
func (l *Lab) ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	w, err := connect(l.dir)
	if err != nil {
		return err
	}
	defer w.close()
	defer context.AfterFunc(ctx, func() { w.c.SetDeadline(time.Unix(1, 0)) })()
	if err := w.send(message{Op: opPing}); err != nil {
		return err
	}
	_, err = w.answer()
	return err
}

// ended says what it means when the other end of a connection is gone.
func ended(err error) error {
	if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, io.EOF) {
		return fault.Unavailablef("the lab's supervisor ended before it answered: try again: %w", io.EOF)
	}
	return err
}

// answer reads the supervisor's answer. One that died instead is io.EOF.
func (w *wire) answer() (answer, error) {
	var a answer
	b, err := w.line(64 << 20)
	if err != nil {
		return a, ended(err)
	}
	if err := json.Unmarshal(b, &a); err != nil {
		return a, err
	}
	return a, a.err()
}
