//go:build !race

package tlsproxy

const raced = false
