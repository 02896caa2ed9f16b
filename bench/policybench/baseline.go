package policybench

const (
	// The deployed table, whose source and destination are unique together: what pgbench writes to.
	baselineTable = `CREATE TABLE policies (id serial PRIMARY KEY, group_id int NOT NULL, destination_id int NOT NULL, UNIQUE (group_id, destination_id))`
	baselineRows  = `INSERT INTO policies (group_id, destination_id) SELECT n, n FROM generate_series(1, ?::int) n`
	// Nine digits twice practically never meet in a run.
	baselineInsert = `\set s random(100000, 999999999)
\set d random(100000, 999999999)
INSERT INTO policies (group_id, destination_id) VALUES (:s, :d);
`
)
