package lab

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"code.cloudfoundry.org/silk/internal/service"
)

// What a responder listens on, in its container.
const (
	HTTPPort = 8080 // answers every request with the container's name
	EchoPort = 7007 // TCP and UDP: sends back what it gets
)

// Respond is what runs in every container of a lab. It returns when ctx ends.
func Respond(ctx context.Context, name string, log *slog.Logger) error {
	web, err := net.Listen("tcp", fmt.Sprintf(":%d", HTTPPort))
	if err != nil {
		return err
	}
	tcp, err := net.Listen("tcp", fmt.Sprintf(":%d", EchoPort))
	if err != nil {
		return err
	}
	udp, err := net.ListenPacket("udp", fmt.Sprintf(":%d", EchoPort))
	if err != nil {
		return err
	}
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) })
	return service.Run(ctx, log,
		service.HTTP("http", web, nil, h, service.DefaultLimits, log),
		service.Task{Name: "tcp echo", Run: func(ctx context.Context) error { return echoTCP(ctx, tcp) }},
		service.Task{Name: "udp echo", Run: func(ctx context.Context) error { return echoUDP(ctx, udp) }})
}

func echoTCP(ctx context.Context, ln net.Listener) error {
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	conns := make(chan struct{}, 256)
	for {
		c, err := ln.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		conns <- struct{}{}
		go func() {
			defer func() { c.Close(); <-conns }()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			io.Copy(c, c)
		}()
	}
}

func echoUDP(ctx context.Context, pc net.PacketConn) error {
	defer context.AfterFunc(ctx, func() { pc.SetReadDeadline(time.Unix(1, 0)) })()
	defer pc.Close()
	b := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFrom(b)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		pc.WriteTo(b[:n], from)
	}
}
