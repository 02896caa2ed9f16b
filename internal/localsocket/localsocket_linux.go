// Package localsocket has sockets by which programs of one host ask each other and know whom they ask. A port of the loopback interface can be taken by
// anybody while its program is away; so can these, but only a program of the caller's own user or root is believed.
//
// Their names are abstract: like ports they belong to a network namespace, and are gone with their process.
package localsocket

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"

	"code.cloudfoundry.org/silk/internal/reconcile"
	"code.cloudfoundry.org/silk/internal/service"
)

// Name returns the address, as package net has it, of what is served beside a port of 127.0.0.1.
func Name(what string, port uint16) string {
	return "@silk/" + what + "/127.0.0.1:" + strconv.Itoa(int(port))
}

// Dial connects to a program of this process's own user or root.
func Dial(ctx context.Context, name string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", name)
	if err != nil {
		return nil, err
	}
	user, err := userOf(c.(*net.UnixConn))
	if own := os.Geteuid(); err == nil && user != own && user != 0 {
		err = fmt.Errorf("user %d listens at %s: expected user %d or root", user, name, own)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// userOf returns who listened for the connection.
func userOf(c *net.UnixConn) (int, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *syscall.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		peer, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil || failed != nil {
		return 0, errors.Join(err, failed)
	}
	return int(peer.Uid), nil
}

// retry is between two attempts to listen.
const retry = time.Second

// Task serves h at a name, at which it listens at once. Nobody owns a name of that kind: whoever has it, a process that is about to end or somebody who has no
// business there, is waited for, and nothing else of the program waits.
func Task(task, name string, h http.Handler, log *slog.Logger) service.Task {
	l, err := net.Listen("unix", name)
	if err != nil {
		log.Error("local socket cannot be listened at yet: programs of this host that ask there are not answered", "socket", name, "error", err)
	}
	return service.Task{Name: task, Run: func(ctx context.Context) error {
		for waited := false; ; waited = true {
			if err == nil {
				if waited {
					log.Info("local socket is listened at", "socket", name)
				}
				return service.HTTP(task, l, nil, h, service.DefaultLimits, log).Run(ctx)
			}
			if !reconcile.Sleep(ctx, retry) {
				return nil
			}
			l, err = net.Listen("unix", name)
		}
	}}
}
