package policyhttp

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"sync"

	"code.cloudfoundry.org/silk/internal/httpjson"
)

// places are how many requests of a kind are served at a time. One peer can have a quarter of them, at least one: whoever reads or sends slowly, or
// asks for everything again and again, does not keep others out.
type places struct {
	all  chan struct{}
	each int

	mu     sync.Mutex
	shares map[string]*share // by peer
}

// share is the places of one peer.
type share struct {
	taken chan struct{}
	users int // that have or want one; guarded by places.mu
}

func newPlaces(n int) *places {
	return &places{all: make(chan struct{}, n), each: max(1, n/4), shares: map[string]*share{}}
}

// enter takes a place for a peer, to be given back by exit. Without one after a while it answers the request and returns false.
//
//go:noinline
func (p *places) enter(w http.ResponseWriter, r *http.Request, peer string) bool {
	p.mu.Lock()
	s := p.shares[peer]
	if s == nil {
		s = &share{taken: make(chan struct{}, p.each)}
		p.shares[peer] = s
	}
	s.users++
	p.mu.Unlock()
	if !httpjson.Enter(s.taken, admission, w, r) {
		p.leave(peer)
		return false
	}
	if !httpjson.Enter(p.all, admission, w, r) {
		<-s.taken
		p.leave(peer)
		return false
	}
	return true
}

// exit gives a place back.
func (p *places) exit(peer string) {
	<-p.all
	<-p.leave(peer).taken
}

func (p *places) leave(peer string) *share {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shares[peer]
	if s.users--; s.users == 0 {
		delete(p.shares, peer)
	}
	return s
}

// peerOf returns the address that a request comes from.
func peerOf(r *http.Request) string {
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		return host
	}
	return r.RemoteAddr
}

// small is the size in bytes up to which bodies are read without a place: nearly all of them.
const small = 64 << 10

// body reads the body of a request, at most limit bytes, and takes a place for a peer if it is not small. release gives that back, once nothing of the
// body is in use any more. ok is false when the request has been answered for want of a place.
func (p *places) body(w http.ResponseWriter, r *http.Request, peer string, limit int64) (b []byte, release func(), ok bool, err error) {
	from := http.MaxBytesReader(w, r.Body, limit)
	release = func() {}
	if b, err = io.ReadAll(io.LimitReader(from, small+1)); err != nil || len(b) <= small {
		return b, release, true, err
	}
	w.Header().Set("Connection", "close") // so that a refusal does not wait for the rest
	if !p.enter(w, r, peer) {
		return nil, release, false, nil
	}
	w.Header().Del("Connection")
	buffer := bytes.NewBuffer(b)
	buffer.Grow(int(min(max(r.ContentLength-int64(len(b)), 0)+bytes.MinRead, limit)))
	_, err = buffer.ReadFrom(from)
	return buffer.Bytes(), sync.OnceFunc(func() { p.exit(peer) }), true, err
}
