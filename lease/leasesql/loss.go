package leasesql

import (
	"time"

	"code.cloudfoundry.org/silk/fault"
)

// fellBehind handles a database that has forgotten revisions of its own epoch: a node of a cluster that lags, for a while; or one that was
// restored from a copy. Then the epoch is renewed.
func (k *keeper) fellBehind(st state) error {
	if k.behind.IsZero() {
		k.behind = time.Now()
		k.s.log.Warn("database went back to an earlier revision", "was", k.at.String(), "is", st.String())
	}
	if time.Since(k.behind) < patience {
		return fault.Unavailablef("the database is at revision %v, but was at %v: waiting for it to catch up", st.Revision, k.at.Revision)
	}
	k.renew = true
	return fault.Unavailablef("the database was restored to an earlier revision: reading it anew")
}
