-- What silk_leases will say of subnets that were never used before, until it does: one row for all that one transaction gave out, instead of
-- one for each with its entries in two indexes. A row of silk_leases that changed later holds.
CREATE TABLE IF NOT EXISTS silk_lease_grants (
	counter bigint NOT NULL,
	subnets varchar(18)[] NOT NULL,
	hosts varchar(15)[] NOT NULL,
	macs varchar(17)[] NOT NULL,
	ids bigint[] NOT NULL
);
CREATE INDEX IF NOT EXISTS silk_lease_grants_counter ON silk_lease_grants (counter);
-- It has no key, so that two stores that race for a counter meet at the revision; without a key of its own, replication needs the whole row.
ALTER TABLE silk_lease_grants REPLICA IDENTITY FULL;
