// Package archtest holds the arrows between Silk's rooms: who may import whom. It has only tests.
package archtest
