// Package nft makes the Linux kernel enforce a firewall.Ruleset: the nft table "inet silk-policy".
//
// The table has one writer and, where the kernel can (6.9), belongs to it: while the writer lives nobody else can change or flush it,
// and it stays when the writer goes. Nothing else in nftables is touched. It is no policy (firewall) and makes no translations (nat).
//
// Use: Open adopts the table or makes one that lets nothing new through; Set brings it to a Ruleset, any number of
// times; Watch says when somebody else changed it; Cut ends what is established and not allowed any more.
package nft

// Name is the nft table, of family inet.
const Name = "silk-policy"

// Options are what does not change while a Table is open.
type Options struct {
	// ConnMask says in which bits of a connection's mark the tag of its source is kept: 16 in a row, by default 0x0000ffff.
	ConnMask uint32

	// LogGroup is the NFLOG group that is told of connections, by default LogGroup.
	LogGroup uint16

	// Unowned leaves the table to everybody, as it must be on kernels before 6.9.
	Unowned bool
}

// Changes says what one Set found and did.
type Changes struct {
	Full     bool // the kernel was looked at whole; otherwise it was certain that nobody else had touched the table
	Desired  int  // elements that should be: sources, destinations, allowances, services
	Observed int  // elements that were there
	Drift    int  // requests that put right what somebody else had changed since the last Set
	Sent     int  // requests that were sent; 0: there was nothing to do
}

// Reason is why packets are refused.
type Reason string

// The reasons, as they are counted.
const (
	NoPolicy           Reason = "no-policy"           // no allowance for the source's group, the protocol and the port
	NoTag              Reason = "no-tag"              // the source has no group that policies speak of
	UnknownSource      Reason = "unknown-source"      // the address is not the device's own, or the endpoint is not in the ruleset
	UnknownDestination Reason = "unknown-destination" // an address of the overlay that is no endpoint's
	FromOutside        Reason = "from-outside"        // to a container, neither from the overlay nor from a container
	HostService        Reason = "host-service"        // to the host itself
	VXLAN              Reason = "vxlan"               // a container's own
	Ended              Reason = "ended"               // an answer on a connection that Cut has ended
	NoRule             Reason = "no-rule"             // to the outside of the overlay, and no list of the container's allows it
	DeniedNetwork      Reason = "denied-network"      // to a network that no list can allow
	RateLimited        Reason = "rate-limited"        // too many connections from one container to one destination
	Invalid            Reason = "invalid"             // tcp to the outside that is part of no connection and begins none
)

// Stats is what the table has counted and holds.
type Stats struct {
	Refused  map[Reason]uint64 // packets, since the table was made
	Unlogged uint64            // packets that the flow log would have been told of, but for the limits
	Elements int               // that the last Set left
	Owned    bool              // nobody else can change the table
}
