package lab_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"code.cloudfoundry.org/silk/fault"
	"code.cloudfoundry.org/silk/lab"
)

// TestWhatIsNotWantedIsCollected attaches containers behind the lab's back: one in its own network, as a supervisor that forgot
// would leave it, and one in the network of a runtime. The next supervisor removes the first, by GC, and no other.
func TestWhatIsNotWantedIsCollected(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Options{Hosts: 1, Containers: 1})
	whole(t, l)
	before := hostState(t, l, "host1")
	attach := func(network, container string) {
		t.Helper()
		_, err := l.Output(t.Context(), "host1", "sh", "-ec", fmt.Sprintf(`
			touch /run/netns/%[2]s
			unshare --net mount --bind /proc/self/ns/net /run/netns/%[2]s
			export CNI_COMMAND=ADD CNI_CONTAINERID=%[2]s CNI_NETNS=/run/netns/%[2]s CNI_IFNAME=eth0 CNI_PATH=/
			echo '{"cniVersion": "1.1.0", "name": "%[1]s", "type": "silk-cni", "daemonPort": 23954}' | silk-cni`, network, container))
		do(t, err)
	}
	attach("lab", "stray")
	attach("silk", "foreign")
	endpoints := func() string {
		out, err := l.Output(t.Context(), "host1", "ls", "/run/silk/endpoints")
		if err != nil && !errors.Is(err, fault.Unavailable) { // of a supervisor that has just been killed
			t.Fatal(err)
		}
		return string(out)
	}
	if got := endpoints(); !strings.Contains(got, "lab@stray@") || !strings.Contains(got, "silk@foreign@") {
		t.Fatalf("attached are\n%s", got)
	}
	do(t, l.Kill(t.Context(), "supervisor"))
	await(t, "the stray is gone", func() error {
		if got := endpoints(); got == "" || strings.Contains(got, "stray") {
			return fmt.Errorf("attached are\n%s", got)
		}
		return nil
	})
	whole(t, l)
	if got := endpoints(); !strings.Contains(got, "silk@foreign@") || !strings.Contains(got, "lab@c1@") {
		t.Errorf("attached are\n%s", got)
	}
	_, err := l.Output(t.Context(), "host1", "sh", "-ec", `
		export CNI_COMMAND=DEL CNI_CONTAINERID=foreign CNI_IFNAME=eth0 CNI_PATH=/
		echo '{"cniVersion": "1.1.0", "name": "silk", "type": "silk-cni", "daemonPort": 23954}' | silk-cni
		umount /run/netns/stray /run/netns/foreign
		rm /run/netns/stray /run/netns/foreign`)
	do(t, err)
	if after := hostState(t, l, "host1"); after != before {
		t.Errorf("host1 has\n%s\nand had\n%s", after, before)
	}
}
