package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"time"
)

// asideLimit bounds what one connection may cost Aside.
const asideLimit = time.Second

// Aside returns a task that tells whoever connects to ln at once what say returns, as one line of JSON, and hangs up. It is for a
// neighbour in a hurry: there is no question to be read and nothing to be agreed on. When it is stopped it closes the listener.
func Aside(name string, ln net.Listener, say func() any, log *slog.Logger) Task {
	return Task{Name: name, Run: func(ctx context.Context) error {
		stop := context.AfterFunc(ctx, func() { ln.Close() })
		defer stop()
		for {
			conn, err := ln.Accept()
			switch {
			case ctx.Err() != nil:
				if err == nil {
					conn.Close()
				}
				return nil
			case errors.Is(err, net.ErrClosed):
				return err
			case err != nil: // out of descriptors, most likely
				log.Warn("a neighbour could not be heard", "task", name, "error", err)
				pause(ctx, asideLimit)
				continue
			}
			if err := tell(conn, say); err != nil {
				log.Error("a neighbour was not told", "task", name, "error", err)
			}
		}
	}}
}

// tell answers one connection. A panic ends no more than that, as in an HTTP server.
func tell(conn net.Conn, say func() any) (err error) {
	defer conn.Close()
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	b, err := json.Marshal(say())
	if err != nil {
		return err
	}
	conn.SetWriteDeadline(time.Now().Add(asideLimit))
	conn.Write(append(b, '\n')) // whoever has gone need not be told
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
