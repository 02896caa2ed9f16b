-- Security groups, in the order of their numbers. rules is a list in the form of Cloud Controller; spaces and members are lists of texts, all as JSON. kept says
-- who keeps the group: 0 people, 1 Cloud Controller. changed is the counter of the last change.
CREATE TABLE IF NOT EXISTS silk_security_groups (
	id bigint NOT NULL PRIMARY KEY,
	guid text NOT NULL,
	name text NOT NULL,
	rules text NOT NULL,
	defaults integer NOT NULL,
	staging_spaces text NOT NULL,
	running_spaces text NOT NULL,
	members text NOT NULL,
	kept integer NOT NULL,
	changed bigint NOT NULL,
	UNIQUE (guid)
);

-- One row: the counter of the revision, whose epoch is that of silk_policy_revision; the digest of all groups; the next number of a group, since none is given twice;
-- until when Cloud Controller's changes are known, in its words; and when a deployed policy-server's table was taken over (microseconds, 0: never).
CREATE TABLE IF NOT EXISTS silk_security_revision (
	id integer NOT NULL PRIMARY KEY,
	counter bigint NOT NULL,
	digest varchar(16) NOT NULL,
	next_id bigint NOT NULL,
	cc_stamp varchar(64) NOT NULL,
	imported_at bigint NOT NULL
);

-- One row: which policy-server follows Cloud Controller, and until when it may, in microseconds by the database's clock.
CREATE TABLE IF NOT EXISTS silk_security_syncer (
	id integer NOT NULL PRIMARY KEY,
	holder varchar(64) NOT NULL,
	until_at bigint NOT NULL
);
