package dns

import (
	"context"
	crand "crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/registration"
)

const (
	reconnectWait   = 2 * time.Second // between attempts, and up to half a second more
	reconnectJitter = 500 * time.Millisecond
	connectTimeout  = 5 * time.Second
	pingInterval    = 2 * time.Second // a connection that is only half there is noticed after three
	pingsUnanswered = 2
	inbox           = 1 << 16         // messages between the connection and the queue, which takes them at once
	firstSaying     = 5 * time.Second // between two lines of the log that there is no connection
	lastSaying      = 5 * time.Minute
	askAgain        = 10 * time.Second // between two calls to all sources because messages were lost
	pruneHint       = 120              // seconds, as the deployed controller says in every start
)

// start is what is published at every connection, and the answer to every greeting.
type start struct {
	ID       string `json:"id"`
	Host     string `json:"host"`
	Interval int    `json:"minimumRegisterIntervalInSeconds"`
	Prune    int    `json:"pruneThresholdInSeconds"`
}

// ear hears registrations on NATS, and says what it is told to. What is heard goes to hear, one after the other, in the order in which it came.
type ear struct {
	cfg   NATS
	log   *slog.Logger
	start []byte // the payload
	hear  func(subject string, payload []byte)
	up    func() // the connection stands, and everything is subscribed to
	down  func()
	asked func(time.Duration) // somebody wants all sources to tell again within that time

	queue *queue
	lost  chan struct{} // has a value when messages were lost
	pause time.Duration // between two calls to all sources because of that

	attempts, connects, dropped, greetings atomic.Uint64

	conn     atomic.Pointer[nats.Conn] // nil until everything is subscribed to
	standing atomic.Bool               // changed with mu held
	refused  atomic.Pointer[error]     // what this connection may not hear; nil: it may hear all
	mu       sync.Mutex                // held while up and down are called
}

// newEar prepares hearing; run does it.
func newEar(cfg Config, log *slog.Logger) (*ear, error) {
	id, err := instanceID(cfg.Index)
	if err != nil {
		return nil, err
	}
	payload, err := json.Marshal(start{ID: id, Host: localAddress(), Interval: cfg.ResumePruning, Prune: pruneHint})
	if err != nil {
		return nil, err
	}
	return &ear{cfg: cfg.NATS, log: log, start: payload, queue: newQueue(), lost: make(chan struct{}, 1), pause: askAgain}, nil
}

// run hears until ctx ends. That there is no server is no error: it is tried for ever.
func (e *ear) run(ctx context.Context) error {
	if len(e.cfg.Hosts) == 0 {
		<-ctx.Done()
		return nil
	}
	var wait sync.WaitGroup
	defer wait.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	in := make(chan *nats.Msg, inbox)
	wait.Go(func() { e.collect(ctx, in) })
	wait.Go(func() { e.read(ctx) })
	wait.Go(func() { e.askAfterLoss(ctx) })

	for first := true; ctx.Err() == nil; first = false {
		switch err := e.connection(ctx, in); {
		case err != nil && first:
			return err // what is configured cannot be
		case err != nil:
			e.log.Error("nats could not be connected to again", "error", err) // such as a certificate that is just being replaced
		}
		// The client goes on by itself after most that can happen, but gives up for good when a server says an error that it does not know.
		reconcile.Sleep(ctx, reconnectWait+rand.N(reconnectJitter))
	}
	return nil
}

// connection hears until ctx ends or the client gives up.
func (e *ear) connection(ctx context.Context, in chan *nats.Msg) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	closed := make(chan struct{})
	options, err := e.options(ctx, func() { close(closed); cancel() })
	if err != nil {
		return err
	}
	conn, err := nats.Connect("", options...)
	if err != nil {
		return fmt.Errorf("connect to nats: %w", err)
	}
	if err = e.subscribe(conn, in); err == nil || conn.IsClosed() {
		err = nil
		if conn.IsConnected() {
			conn.FlushTimeout(connectTimeout) // who sees us connected may take it that he is heard
		}
		e.stands()
		e.attend(ctx, conn)
		if conn.IsConnected() {
			conn.FlushTimeout(time.Second)
		}
	}
	last := conn.LastError()
	conn.Close()
	<-closed
	e.conn.Store(nil)
	e.broke(last)
	return err
}

// attend waits for the end of ctx, and says now and then that there is no connection. A server tells nobody that he may hear now what he was refused before,
// so that is tried by connecting anew.
func (e *ear) attend(ctx context.Context, conn *nats.Conn) {
	for pause := firstSaying; reconcile.Sleep(ctx, pause); pause = min(2*pause, lastSaying) {
		err := e.trouble()
		if err == nil {
			pause = firstSaying / 2
			continue
		}
		e.log.Warn("nats is not heard", "error", err, "attempts", e.attempts.Load())
		if e.refused.Load() != nil {
			conn.ForceReconnect() // fails if it is closed, which ends ctx
		}
	}
}

// trouble returns why nothing is heard, nil when something is, or nothing is to be.
func (e *ear) trouble() error {
	if r := e.refused.Load(); r != nil {
		return *r
	}
	if len(e.cfg.Hosts) == 0 || e.standing.Load() {
		return nil
	}
	if c := e.conn.Load(); c != nil && c.LastError() != nil {
		return fmt.Errorf("not connected: %w", c.LastError())
	}
	return errors.New("not connected")
}

// options says how connections are made.
func (e *ear) options(ctx context.Context, closed func()) ([]nats.Option, error) {
	var user *url.Userinfo
	if e.cfg.User != "" || e.cfg.Password != "" {
		user = url.UserPassword(e.cfg.User, e.cfg.Password)
	}
	var servers []string
	for _, h := range e.cfg.Hosts {
		servers = append(servers, h.url(user))
	}
	list := []nats.Option{
		func(o *nats.Options) error { o.Servers = servers; return nil },
		nats.Name("silk-dns"), nats.Timeout(connectTimeout), nats.SetCustomDialer(dialer{ctx, &e.attempts}),
		nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(reconnectWait), nats.ReconnectJitter(reconnectJitter, reconnectJitter),
		nats.IgnoreAuthErrorAbort(),    // a password may be changed there first and here later, or be back in a minute
		nats.IgnoreDiscoveredServers(), // credentials go to no others than those that the operator named
		nats.PingInterval(pingInterval), nats.MaxPingsOutstanding(pingsUnanswered), nats.FlusherTimeout(connectTimeout),
		nats.ReconnectBufSize(-1), // what is said to nobody is not said late either
		nats.ConnectHandler(func(*nats.Conn) { e.stands() }),
		nats.ReconnectHandler(func(*nats.Conn) { e.stands() }),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { e.broke(err) }),
		nats.ClosedHandler(func(*nats.Conn) { closed() }),
		nats.ErrorHandler(func(_ *nats.Conn, s *nats.Subscription, err error) { e.complained(s, err) }),
	}
	if e.cfg.TLS {
		tc, err := e.cfg.tls()
		if err != nil {
			return nil, err
		}
		list = append(list, nats.Secure(tc))
	}
	return list, nil
}

// url returns how the client of NATS wants a server to be named.
func (h NATSHost) url(user *url.Userinfo) string {
	u := url.URL{Scheme: "nats", User: user, Host: net.JoinHostPort(h.Hostname, strconv.Itoa(int(h.Port)))}
	return u.String()
}

// dialer counts attempts, and gives up when its context ends.
type dialer struct {
	ctx      context.Context
	attempts *atomic.Uint64
}

// Dial implements nats.CustomDialer.
func (d dialer) Dial(network, address string) (net.Conn, error) {
	d.attempts.Add(1)
	ctx, cancel := context.WithTimeout(d.ctx, connectTimeout)
	defer cancel()
	var nd net.Dialer
	return nd.DialContext(ctx, network, address)
}

// subscribe asks for everything; the connection repeats it whenever it is made anew. Registrations and their opposites go into one channel, or
// what a source said first could be heard last. A greeting has a goroutine of its own and waits behind none of them: emitters exit after 30 that nobody
// answered.
func (e *ear) subscribe(conn *nats.Conn, in chan *nats.Msg) error {
	for _, subject := range []string{registration.SubjectRegister, registration.SubjectUnregister} {
		if _, err := conn.ChanSubscribe(subject, in); err != nil {
			return fmt.Errorf("subscribe to %s: %w", subject, err)
		}
	}
	_, err := conn.Subscribe(registration.SubjectGreet, func(m *nats.Msg) {
		if m.Reply == "" {
			return
		}
		e.greetings.Add(1)
		if err := m.Respond(e.start); err != nil {
			e.log.Debug("a greeting was not answered", "error", err)
		}
	})
	if err == nil {
		_, err = conn.Subscribe(registration.SubjectStart, func(m *nats.Msg) { e.asked(intervalOf(m.Data)) })
	}
	if err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	e.conn.Store(conn)
	return nil
}

// intervalOf reads what a start says of how often its sender wants to be told; the usual where it says nothing of use.
func intervalOf(b []byte) time.Duration {
	s := start{}
	if err := json.Unmarshal(b, &s); err != nil || s.Interval < 1 || s.Interval > maxInterval {
		return seconds(DefaultConfig().ResumePruning)
	}
	return seconds(s.Interval)
}

// stands is called when a connection has been made.
func (e *ear) stands() {
	e.mu.Lock()
	defer e.mu.Unlock()
	conn := e.conn.Load()
	if conn == nil || e.standing.Load() || !conn.IsConnected() {
		return // run comes here once everything is subscribed to
	}
	e.standing.Store(true)
	e.connects.Add(1)
	e.log.Info("nats connected", "server", conn.ConnectedUrlRedacted())
	if e.refused.Load() == nil { // which may have been said already
		e.up()
	}
	e.ask()
}

// broke is called when a connection has ended.
func (e *ear) broke(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refused.Store(nil)
	if !e.standing.Swap(false) {
		return
	}
	e.down()
	e.log.Warn("nats disconnected: names stay as they are", "error", err)
}

// ask calls on all sources to tell what they know.
func (e *ear) ask() {
	if err := e.publish(registration.SubjectStart, e.start); err != nil {
		e.log.Warn("sources were not asked to tell again", "error", err)
	}
}

// complained is told what goes wrong on a connection beside its end.
func (e *ear) complained(s *nats.Subscription, err error) {
	if errors.Is(err, nats.ErrSlowConsumer) {
		n, _ := s.Dropped()
		e.drop(uint64(max(n, 1)))
		return
	}
	e.log.Error("nats refused something", "error", err)
	if errors.Is(err, nats.ErrMaxSubscriptionsExceeded) || deaf(err) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.refused.Store(&err)
		e.down() // who may not listen hears nothing, which says nothing about names
	}
}

// deaf reports whether an error is that we may not hear of registrations. That we may not hear who else starts, which the deployed controller does not
// do either, says nothing about names. Of a violation the client has no other word for what was not permitted.
func deaf(err error) bool {
	text := strings.ToLower(err.Error())
	return errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(text, "subscription") &&
		(strings.Contains(text, registration.SubjectRegister) || strings.Contains(text, registration.SubjectUnregister))
}

// drop counts lost messages and has them asked for.
func (e *ear) drop(n uint64) {
	e.dropped.Add(n)
	select {
	case e.lost <- struct{}{}:
	default:
	}
}

// askAfterLoss lets sources tell again what was lost.
func (e *ear) askAfterLoss(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.lost:
		}
		if !reconcile.Sleep(ctx, e.pause) { // what is too much now would be too much again
			return
		}
		e.log.Error("messages were lost: sources are asked to tell again", "lost", e.dropped.Load())
		if e.standing.Load() {
			e.ask()
		}
	}
}

// collect moves messages from the connection into the queue, fast enough for any server.
func (e *ear) collect(ctx context.Context, in <-chan *nats.Msg) {
	for {
		select {
		case <-ctx.Done():
			return
		case m := <-in:
			if len(m.Data) > registration.MaxMessage {
				m.Data = nil // is malformed then, and is not kept until it is read
			}
			if !e.queue.put(m) {
				e.drop(1)
			}
		}
	}
}

// read hears what is in the queue.
func (e *ear) read(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-e.queue.wake:
		}
		list := e.queue.take()
		for i, m := range list {
			if ctx.Err() != nil {
				return
			}
			e.hear(m.Subject, m.Data)
			e.queue.done(m)
			list[i] = nil
		}
	}
}

// publish says something, if there is somebody to hear it.
func (e *ear) publish(subject string, payload []byte) error {
	if !e.standing.Load() {
		return nats.ErrConnectionClosed
	}
	conn := e.conn.Load()
	if conn == nil {
		return nats.ErrConnectionClosed
	}
	return conn.Publish(subject, payload)
}

// instanceID returns "<index>-<uuid>" with a random UUID of version 4.
func instanceID(index string) (string, error) {
	var b [16]byte
	if _, err := crand.Read(b[:]); err != nil {
		return "", err
	}
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%s-%x-%x-%x-%x-%x", index, b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}

// localAddress returns the address from which the host would send to others, as the deployed controller finds it; nothing is sent.
func localAddress() string {
	c, err := net.Dial("udp4", "1.2.3.4:1")
	if err != nil {
		return "127.0.0.1"
	}
	defer c.Close()
	a, _ := netip.ParseAddrPort(c.LocalAddr().String())
	return a.Addr().String()
}
