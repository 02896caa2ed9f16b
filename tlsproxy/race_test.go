//go:build race

package tlsproxy

// raced says that this binary watches memory, which takes time and memory of its own.
const raced = true
