-- Who has which tag, or had it: name is absent while the tag is free; then former is who had it, and freed_at since when it is free, in microseconds by the
-- database's clock. assigned is the revision's counter when the tag was given, changed at the last change.
CREATE TABLE IF NOT EXISTS silk_policy_groups (
	tag integer NOT NULL PRIMARY KEY,
	name text,
	former text NOT NULL,
	kind text NOT NULL,
	freed_at bigint NOT NULL,
	assigned bigint NOT NULL,
	changed bigint NOT NULL,
	UNIQUE (name)
);
CREATE INDEX IF NOT EXISTS silk_policy_groups_changed ON silk_policy_groups (changed);

-- What may talk to what. A policy that was removed stays for some time with gone 1, so that others learn of it. That the tags are somebody's is proved by
-- the revision, which is part of every transaction: a foreign key would look for each of them again, and cost more than all else that is done for a policy.
CREATE TABLE IF NOT EXISTS silk_policies (
	source_tag integer NOT NULL,
	destination_tag integer NOT NULL,
	protocol integer NOT NULL,
	first_port integer NOT NULL,
	last_port integer NOT NULL,
	gone integer NOT NULL,
	changed bigint NOT NULL,
	PRIMARY KEY (source_tag, destination_tag, protocol, first_port, last_port)
);
CREATE INDEX IF NOT EXISTS silk_policies_changed ON silk_policies (changed);

-- One row: the revision, the counter up to which removed policies may have been forgotten, the stamp for agents that ask whether anything changed
-- (nanoseconds), and when a deployed policy-server's tables were taken over (microseconds, 0: never).
CREATE TABLE IF NOT EXISTS silk_policy_revision (
	id integer NOT NULL PRIMARY KEY,
	epoch varchar(64) NOT NULL,
	counter bigint NOT NULL,
	pruned bigint NOT NULL,
	stamp bigint NOT NULL,
	imported_at bigint NOT NULL
);

-- One row a policy-server: what the agents that report to it have in force. seen is the newest counter it knows, low the oldest that an agent has in force,
-- lagging the first of the behind agents that do not have seen, as JSON. Times are in microseconds by the database's clock.
CREATE TABLE IF NOT EXISTS silk_policy_servers (
	id varchar(64) NOT NULL PRIMARY KEY,
	epoch varchar(64) NOT NULL,
	seen bigint NOT NULL,
	low bigint NOT NULL,
	reporting bigint NOT NULL,
	silent bigint NOT NULL,
	behind bigint NOT NULL,
	lagging text NOT NULL,
	deployed_at bigint NOT NULL,
	beat_at bigint NOT NULL
);

-- To which policy-server a host's agent last reported, and since when.
CREATE TABLE IF NOT EXISTS silk_policy_hosts (
	host text NOT NULL PRIMARY KEY,
	server varchar(64) NOT NULL,
	claimed_at bigint NOT NULL
);
