-- One row per fact about the database as a whole: `format` is the number of the newest migration.
CREATE TABLE meta (
    fact  TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    value TEXT COLLATE "C" NOT NULL
);
INSERT INTO meta (fact, value) VALUES ('format', '4');

-- Servers that share the database. Their jobs are theirs until `until_ms`, by the clock of the database.
CREATE TABLE servers (
    id          TEXT COLLATE "C"   NOT NULL PRIMARY KEY,
    incarnation TEXT COLLATE "C"   NOT NULL,             -- of the process: an earlier one of the same id writes no more
    until_ms    BIGINT NOT NULL,
    started_ms  BIGINT NOT NULL
);

-- The server that a job belongs to; empty: the only one.
ALTER TABLE jobs ADD COLUMN owner TEXT COLLATE "C" NOT NULL DEFAULT '';
-- What another server was asked to do with the job, for its owner to do.
ALTER TABLE jobs ADD COLUMN ask TEXT COLLATE "C" NOT NULL DEFAULT '';
CREATE INDEX jobs_owner ON jobs (owner);

-- Grows with every change of any name, in the order of commits.
ALTER TABLE deltas ADD COLUMN change BIGINT NOT NULL DEFAULT 0;
CREATE INDEX deltas_change ON deltas (change);

-- Blobs that a server is about to name: no other one collects them before `until_ms`.
CREATE TABLE blob_holds (
    blob     TEXT COLLATE "C"   NOT NULL,
    owner    TEXT COLLATE "C"   NOT NULL,
    until_ms BIGINT NOT NULL,
    PRIMARY KEY (blob, owner)
);

-- Blobs found without a row: since when, and whether one is being removed now (since when; 0: it is not).
CREATE TABLE garbage (
    blob       TEXT COLLATE "C"   NOT NULL PRIMARY KEY,
    since_ms   BIGINT NOT NULL,
    claimed_ms BIGINT NOT NULL DEFAULT 0
);
