package registrationhttp

import (
	"context"
	"net"
	"net/http"
	"time"

	"code.cloudfoundry.org/silk/internal/localsocket"
)

// NamesSocket returns the address of the local socket, as package net has it, at which the silk-dns whose debug server has the port answers PathNames to
// programs of its host.
func NamesSocket(port uint16) string { return localsocket.Name("names", port) }

// NewLocalNames is NewNames for the silk-dns of this host whose debug server has the port. It is asked at its NamesSocket, and only one of this process's own
// user or root is believed: who says how containers are called says what is in their certificates.
func NewLocalNames(port uint16, timeout time.Duration) *Names {
	c := NewNames("http://silk-dns", timeout)
	c.http.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		return localsocket.Dial(ctx, NamesSocket(port))
	}
	return c
}
