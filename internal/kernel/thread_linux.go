package kernel

// OnThread runs fn on a thread of its own, never the main one, that is given up afterwards: what fn does to the thread's
// namespaces, root or processors reaches no other goroutine.
func OnThread(fn func() error) error { return onThread(fn) }
