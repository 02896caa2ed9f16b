// Package registration names what containers are called: which name stands for which addresses, as those who start containers say it.
//
// A name is told of again and again by its source; one that is not told of for long is stale. The package knows the messages in which
// sources speak (section 11 of the deployed controller's contract) and keeps the Table; it hears nothing itself and answers nobody
// (dns, registration/registrationhttp).
//
// Use: ParseMessage what a source says, Register or Unregister it in a Table, Lookup names there.
package registration

import (
	"net/netip"
	"time"

	"code.cloudfoundry.org/silk/registration/name"
)

// MaxName bounds a name in bytes, without the final dot.
const MaxName = name.Max

// Name is a domain name in its one form, see package name.
type Name = name.Name

// ParseName reads a name in any case, with or without the final dot. fault.Invalid says what is wrong with it.
func ParseName(s string) (Name, error) { return name.Parse(s) }

// Registration says that a container at Address is called Name.
type Registration struct {
	Name    Name
	Address netip.Addr
	Port    uint16 // where it listens, for SRV answers; 0: not said

	Endpoint string // id of the container as its platform calls it; "": not said
	Index    int    // of the instance among those of its name; -1: not said
	Zone     string // availability zone; "": not said
	Group    string // policy group (Cloud Foundry: app GUID); "": not said

	Updated time.Time // when its source changed it; zero: not said
	Seen    time.Time // when it was told of last, by the clock of who keeps the table
}
