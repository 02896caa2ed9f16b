package endpoint_test

import (
	"context"
	"os/exec"
	"testing"
	"time"

	"code.cloudfoundry.org/silk/endpoint"
	"code.cloudfoundry.org/silk/internal/testkit/netns"
)

// watching starts a Watch and returns what it has heard, and how to end it.
func watching(t *testing.T, h host) (heard chan struct{}, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	heard = make(chan struct{}, 100)
	go func() { done <- endpoint.Watch(ctx, h.ns, func() { heard <- struct{}{} }) }()
	return heard, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// awaitHeard waits for a call, and takes those that came with it.
func awaitHeard(t *testing.T, heard chan struct{}, what string) {
	t.Helper()
	select {
	case <-heard:
	case <-time.After(5 * time.Second):
		t.Fatalf("%s: nothing heard", what)
	}
	for len(heard) > 0 {
		<-heard
	}
}

func TestWatchHearsOfContainers(t *testing.T) {
	h, c := newHost(t), netns.New(t)
	heard, stop := watching(t, h)
	defer stop()
	awaitHeard(t, heard, "the start")
	h.must(h.attach(h.spec("one", c)))
	awaitHeard(t, heard, "an attachment")
	if err := h.detach(key("one"), c); err != nil {
		t.Fatal(err)
	}
	awaitHeard(t, heard, "a detachment")
}

func TestWatchPassesOverOtherDevices(t *testing.T) {
	h := newHost(t)
	heard, stop := watching(t, h)
	awaitHeard(t, heard, "the start")
	err := h.ns.Do(func() error {
		return exec.Command("ip", "link", "add", "other0", "type", "veth", "peer", "name", "other1").Run()
	})
	stop()
	if err != nil {
		t.Fatal(err)
	}
	if len(heard) > 0 {
		t.Error("a device that is no container's was heard of")
	}
}
