package service_test

import (
	"context"
	"io"
	"net"
	"testing"

	"code.cloudfoundry.org/silk/internal/service"
)

func TestAsideTellsEveryone(t *testing.T) {
	const address = "@silk-test-aside"
	ln, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	n := 0
	say := func() any {
		if n++; n == 3 {
			panic("out of order")
		}
		return map[string]int{"n": n}
	}
	go func() {
		done <- service.Run(ctx, discard, service.Aside("aside", ln, say, discard))
	}()
	mute, err := net.Dial("unix", address) // takes nothing, and is in nobody's way
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	for _, want := range []string{"{\"n\":2}\n", "", "{\"n\":4}\n"} {
		conn, err := net.Dial("unix", address)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); string(got) != want || err != nil {
			t.Errorf("%q %v, want %q", got, err, want)
		}
		conn.Close()
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if conn, err := net.Dial("unix", address); err == nil {
		conn.Close()
		t.Error("the listener stands after the end")
	}
}
