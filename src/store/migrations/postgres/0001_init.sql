-- Text compares by its bytes, as it does in SQLite.
-- Names and their current version. A row outlives its versions, so that a number is never used twice.
CREATE TABLE deltas (
    tenant      TEXT COLLATE "C"    NOT NULL,
    name        TEXT COLLATE "C"    NOT NULL,
    current     BIGINT,                       -- number of the current version; NULL: no live version
    next_number BIGINT  NOT NULL DEFAULT 1,
    pinned      BIGINT  NOT NULL DEFAULT 0,
    revision    BIGINT  NOT NULL DEFAULT 0,   -- grows with every change of the name or of its versions
    created_ms  BIGINT  NOT NULL,
    updated_ms  BIGINT  NOT NULL,
    PRIMARY KEY (tenant, name)
);

-- Immutable versions. A deleted version keeps its row and loses its files.
CREATE TABLE versions (
    tenant       TEXT COLLATE "C"    NOT NULL,
    name         TEXT COLLATE "C"    NOT NULL,
    number       BIGINT  NOT NULL,
    id           TEXT COLLATE "C"    NOT NULL,
    base         TEXT COLLATE "C"    NOT NULL,
    spec_json    TEXT COLLATE "C"    NOT NULL,
    stored_bytes BIGINT  NOT NULL,
    origin       TEXT COLLATE "C"    NOT NULL,
    created_ms   BIGINT  NOT NULL,
    deleted_ms   BIGINT,
    PRIMARY KEY (tenant, name, number),
    FOREIGN KEY (tenant, name) REFERENCES deltas (tenant, name)
);
ALTER TABLE deltas ADD FOREIGN KEY (tenant, name, current) REFERENCES versions (tenant, name, number)
    DEFERRABLE INITIALLY DEFERRED;
CREATE UNIQUE INDEX versions_live_id ON versions (tenant, name, id) WHERE deleted_ms IS NULL;

CREATE TABLE version_files (
    tenant TEXT COLLATE "C"    NOT NULL,
    name   TEXT COLLATE "C"    NOT NULL,
    number BIGINT  NOT NULL,
    file   TEXT COLLATE "C"    NOT NULL,
    blob   TEXT COLLATE "C"    NOT NULL,
    bytes  BIGINT  NOT NULL,
    PRIMARY KEY (tenant, name, number, file),
    FOREIGN KEY (tenant, name, number) REFERENCES versions (tenant, name, number)
);
CREATE INDEX version_files_blob ON version_files (blob);

CREATE TABLE datasets (
    id         TEXT COLLATE "C"    NOT NULL PRIMARY KEY,
    tenant     TEXT COLLATE "C"    NOT NULL,
    name       TEXT COLLATE "C",
    blob       TEXT COLLATE "C"    NOT NULL,
    format     TEXT COLLATE "C"    NOT NULL,
    row_count  BIGINT  NOT NULL,
    bytes      BIGINT  NOT NULL,
    created_ms BIGINT  NOT NULL
);
CREATE INDEX datasets_tenant ON datasets (tenant, id);
CREATE INDEX datasets_blob ON datasets (blob);

CREATE TABLE jobs (
    id            TEXT COLLATE "C"    NOT NULL PRIMARY KEY,
    tenant        TEXT COLLATE "C"    NOT NULL,
    output_name   TEXT COLLATE "C"    NOT NULL,
    state         TEXT COLLATE "C"    NOT NULL,
    request_json  TEXT COLLATE "C"    NOT NULL,
    resolved_json TEXT COLLATE "C"    NOT NULL,
    result_json   TEXT COLLATE "C",
    created_ms    BIGINT  NOT NULL,
    updated_ms    BIGINT  NOT NULL,
    last_seq      BIGINT  NOT NULL DEFAULT 0
);
CREATE INDEX jobs_tenant ON jobs (tenant, id);
CREATE INDEX jobs_state ON jobs (state);

CREATE TABLE job_events (
    job_id    TEXT COLLATE "C"    NOT NULL REFERENCES jobs (id),
    seq       BIGINT  NOT NULL,
    at_ms     BIGINT  NOT NULL,
    body_json TEXT COLLATE "C"    NOT NULL,
    PRIMARY KEY (job_id, seq)
);

-- Blobs that a job keeps alive: its data, its checkpoints.
CREATE TABLE job_blobs (
    job_id TEXT COLLATE "C" NOT NULL REFERENCES jobs (id),
    name   TEXT COLLATE "C" NOT NULL,
    blob   TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (job_id, name)
);
CREATE INDEX job_blobs_blob ON job_blobs (blob);

CREATE TABLE idempotency (
    tenant          TEXT COLLATE "C"    NOT NULL,
    idempotency_key TEXT COLLATE "C"    NOT NULL,
    request_digest  TEXT COLLATE "C"    NOT NULL,
    job_id          TEXT COLLATE "C"    NOT NULL REFERENCES jobs (id),
    created_ms      BIGINT  NOT NULL,
    PRIMARY KEY (tenant, idempotency_key)
);
