-- The table that other controllers on this database share. Its columns and constraints are theirs as much as ours.
CREATE TABLE IF NOT EXISTS subnets (
	id int NOT NULL AUTO_INCREMENT PRIMARY KEY,
	underlay_ip varchar(15) NOT NULL,
	overlay_subnet varchar(18) NOT NULL,
	overlay_hwaddr varchar(17) NOT NULL,
	last_renewed_at bigint NOT NULL,
	UNIQUE (underlay_ip),
	UNIQUE (overlay_subnet),
	UNIQUE (overlay_hwaddr)
) ENGINE=InnoDB;

-- What was last made known of each subnet: state 0 is active, 1 is expired but not yet given away, 2 is free again. row_id is subnets.id,
-- by which changes that others make are noticed; changed is the revision's counter at the last change.
CREATE TABLE IF NOT EXISTS silk_leases (
	overlay_subnet varchar(18) NOT NULL PRIMARY KEY,
	underlay_ip varchar(15) NOT NULL,
	overlay_hwaddr varchar(17) NOT NULL,
	row_id bigint NOT NULL,
	state integer NOT NULL,
	freed_at bigint NOT NULL,
	changed bigint NOT NULL,
	INDEX silk_leases_changed (changed)
) ENGINE=InnoDB;

-- One row: the revision, and the counter up to which changes may have been forgotten.
CREATE TABLE IF NOT EXISTS silk_lease_revision (
	id integer NOT NULL PRIMARY KEY,
	epoch varchar(64) NOT NULL,
	counter bigint NOT NULL,
	pruned bigint NOT NULL
) ENGINE=InnoDB;
