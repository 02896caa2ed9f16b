-- Security groups, in the order of their numbers. rules is a list in the form of Cloud Controller; spaces and members are lists of texts, all as JSON. kept says
-- who keeps the group: 0 people, 1 Cloud Controller. changed is the counter of the last change.
CREATE TABLE IF NOT EXISTS silk_security_groups (
	id bigint NOT NULL PRIMARY KEY,
	guid varbinary(36) NOT NULL,
	name varbinary(255) NOT NULL,
	rules longtext NOT NULL,
	defaults integer NOT NULL,
	staging_spaces longtext NOT NULL,
	running_spaces longtext NOT NULL,
	members longtext NOT NULL,
	kept integer NOT NULL,
	changed bigint NOT NULL,
	UNIQUE (guid)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

-- One row: the counter of the revision, whose epoch is that of silk_policy_revision; the digest of all groups; the next number of a group, since none is given twice;
-- until when Cloud Controller's changes are known, in its words; and when a deployed policy-server's table was taken over (microseconds, 0: never).
CREATE TABLE IF NOT EXISTS silk_security_revision (
	id integer NOT NULL PRIMARY KEY,
	counter bigint NOT NULL,
	digest varchar(16) NOT NULL,
	next_id bigint NOT NULL,
	cc_stamp varchar(64) NOT NULL,
	imported_at bigint NOT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;

-- One row: which policy-server follows Cloud Controller, and until when it may, in microseconds by the database's clock.
CREATE TABLE IF NOT EXISTS silk_security_syncer (
	id integer NOT NULL PRIMARY KEY,
	holder varchar(64) NOT NULL,
	until_at bigint NOT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
