package leasebench

const (
	// The deployed table, with its three unique columns: what pgbench writes to.
	baselineTable = `CREATE TABLE subnets (id serial PRIMARY KEY, underlay_ip varchar(15) NOT NULL UNIQUE, overlay_subnet varchar(18) NOT NULL UNIQUE,
overlay_hwaddr varchar(17) NOT NULL UNIQUE, last_renewed_at bigint NOT NULL)`
	baselineRows = `INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at)
SELECT n, n, n, extract(epoch FROM now()) FROM generate_series(1, ?::int) n`
	// One random number stands for all three columns; 15 digits never meet twice in a run.
	baselineInsert = `\set n random(100000000000000, 999999999999999)
INSERT INTO subnets (underlay_ip, overlay_subnet, overlay_hwaddr, last_renewed_at) VALUES (:n, :n, :n, extract(epoch FROM now())::bigint);
`
	baselineUpdate = `\set n random(1, 10000)
UPDATE subnets SET last_renewed_at = extract(epoch FROM now())::bigint WHERE underlay_ip = :n::text;
`
)
