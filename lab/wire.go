package lab

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"code.cloudfoundry.org/silk/fault"
	"golang.org/x/sys/unix"
)

// Commands and the supervisor speak JSON lines over a stream socket in the lab's directory: one request and one
// answer, then, for exec alone, signals one way and the exit status the other. The first line of an exec carries the three
// standard files.
const (
	socketName = "lab.sock"
	lineLimit  = 1 << 20 // of a request or signal; answers may be longer
)

// The operations of a request.
const (
	opPing      = "ping"
	opStatus    = "status"
	opExec      = "exec"
	opAdd       = "add"
	opRemove    = "rm"
	opKill      = "kill"
	opPartition = "partition"
	opHeal      = "heal"
)

type message struct {
	Op      string   `json:"op"`
	Name    string   `json:"name,omitempty"`    // of a host, container or program
	Host    string   `json:"host,omitempty"`    // add: where; "-" for a new host
	Group   string   `json:"group,omitempty"`   // add: policy group of the container
	Ports   []Port   `json:"ports,omitempty"`   // add: of its host that lead to the container
	Command []string `json:"command,omitempty"` // exec
	Env     []string `json:"env,omitempty"`     // exec, beyond the lab's own
	Signal  int      `json:"signal,omitempty"`  // a further line of exec
}

type answer struct {
	Error   string     `json:"error,omitempty"`
	Kind    fault.Kind `json:"kind,omitempty"`
	Name    string     `json:"name,omitempty"`   // add: what was added
	Address netip.Addr `json:"address,omitzero"` // add: of the container
	Status  *Status    `json:"status,omitempty"`
	Exit    int        `json:"exit,omitempty"`
}

func (a *answer) err() error {
	if a.Error == "" {
		return nil
	}
	return fault.New(a.Kind, errors.New(a.Error))
}

// wire is one connection.
type wire struct {
	c     *net.UnixConn
	buf   []byte     // received and not yet read as lines
	files []*os.File // received
}

// listen opens the lab's socket. The caller holds the supervisor's lock, so one that is there is a dead one's.
func listen(dir string) (*net.UnixListener, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if err := os.Remove(filepath.Join(dir, socketName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", socketAddr(d))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", filepath.Join(dir, socketName), err)
	}
	ln.SetUnlinkOnClose(false)
	return ln, nil
}

func connect(dir string) (*wire, error) {
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) { // taken down since
		return nil, fault.NotFoundf("no lab in %s", dir)
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	c, err := net.DialUnix("unix", nil, socketAddr(d))
	if err != nil {
		return nil, fault.Unavailablef("the lab's supervisor does not answer: %w", err)
	}
	return &wire{c: c}, nil
}

// socketAddr names the socket by way of the open directory: a path of any length would not fit into 107 bytes.
func socketAddr(d *os.File) *net.UnixAddr {
	return &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), socketName), Net: "unix"}
}

func (w *wire) close() {
	w.c.Close()
	for _, f := range w.files {
		f.Close()
	}
	w.files = nil
}

// send writes v as a line, with the files if there are any.
func (w *wire) send(v any, files ...*os.File) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	if len(files) == 0 {
		_, err = w.c.Write(b)
		return err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	n, _, err := w.c.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	if err == nil && n < len(b) {
		_, err = w.c.Write(b[n:])
	}
	return err
}

// line returns the next line of at most limit bytes, io.EOF at the end. Files that come with it are added to w.files.
func (w *wire) line(limit int) ([]byte, error) {
	chunk, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*8))
	for {
		if i := bytes.IndexByte(w.buf, '\n'); i >= 0 {
			l := w.buf[:i]
			w.buf = w.buf[i+1:]
			return l, nil
		}
		if len(w.buf) > limit {
			return nil, fault.Invalidf("a line of more than %d bytes", limit)
		}
		n, oobn, _, _, err := w.c.ReadMsgUnix(chunk, oob)
		if err != nil {
			return nil, err
		}
		if err := w.take(oob[:oobn]); err != nil {
			return nil, err
		}
		if n == 0 {
			return nil, io.EOF
		}
		w.buf = append(w.buf, chunk[:n]...)
	}
}

// take keeps the descriptors of a control message.
func (w *wire) take(oob []byte) error {
	if len(oob) == 0 {
		return nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fault.Invalidf("control message: %w", err)
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return fault.Invalidf("control message: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			w.files = append(w.files, os.NewFile(uintptr(fd), "passed file"))
		}
	}
	return nil
}

// parseRequest refuses, as fault.Invalid, what no command sends.
func parseRequest(b []byte) (message, error) {
	var r message
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fault.Invalidf("request: %w", err)
	}
	if r.Op == opExec && len(r.Command) == 0 {
		return r, fault.Invalidf("exec: no command given")
	}
	return r, nil
}
