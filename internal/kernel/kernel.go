// Package kernel is how Silk's kernel-facing rooms speak to Linux: network namespaces as arguments, rtnetlink
// requests packed into few sends, dumps that are whole or an error, sysctls of a namespace.
//
// It knows no nouns of Silk: overlay, endpoint, nat and firewall say what is to be there. Everything here
// works on the namespace it is given and leaves the calling goroutine in its own.
package kernel
