// Package roomy gives the main goroutine, as a program starts, the stack that it will need. It is imported for that effect alone, by
// programs that live for milliseconds.
//
// The runtime starts with 2 KiB and doubles that whenever it does not suffice: it copies what is there, for which it reads tables
// of the program that are not in memory yet, and touches the pages of several stacks of every size on the way. This package
// imports nothing, so it is initialised before all others but the runtime's.
package roomy

// size is what makes a stack of 16 KiB, in bytes. An ADD of silk-cni needs more than 8 KiB.
const size = 9 << 10

func init() { grow(false) }

// grow has a large frame. What is in it is not the point: it is not even cleared.
//
//go:noinline
func grow(never bool) {
	if never {
		var room [size]byte
		touch(&room)
	}
}

//go:noinline
func touch(room *[size]byte) { room[0]++ }
