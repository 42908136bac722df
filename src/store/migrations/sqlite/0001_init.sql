-- Names and their current version. A row outlives its versions, so that a number is never used twice.
CREATE TABLE deltas (
    tenant      TEXT    NOT NULL,
    name        TEXT    NOT NULL,
    current     BIGINT,                       -- number of the current version; NULL: no live version
    next_number BIGINT  NOT NULL DEFAULT 1,
    pinned      BIGINT  NOT NULL DEFAULT 0,
    revision    BIGINT  NOT NULL DEFAULT 0,   -- grows with every change of the name or of its versions
    created_ms  BIGINT  NOT NULL,
    updated_ms  BIGINT  NOT NULL,
    PRIMARY KEY (tenant, name),
    FOREIGN KEY (tenant, name, current) REFERENCES versions (tenant, name, number) DEFERRABLE INITIALLY DEFERRED
);

-- Immutable versions. A deleted version keeps its row and loses its files.
CREATE TABLE versions (
    tenant       TEXT    NOT NULL,
    name         TEXT    NOT NULL,
    number       BIGINT  NOT NULL,
    id           TEXT    NOT NULL,
    base         TEXT    NOT NULL,
    spec_json    TEXT    NOT NULL,
    stored_bytes BIGINT  NOT NULL,
    origin       TEXT    NOT NULL,
    created_ms   BIGINT  NOT NULL,
    deleted_ms   BIGINT,
    PRIMARY KEY (tenant, name, number),
    FOREIGN KEY (tenant, name) REFERENCES deltas (tenant, name)
);
CREATE UNIQUE INDEX versions_live_id ON versions (tenant, name, id) WHERE deleted_ms IS NULL;

CREATE TABLE version_files (
    tenant TEXT    NOT NULL,
    name   TEXT    NOT NULL,
    number BIGINT  NOT NULL,
    file   TEXT    NOT NULL,
    blob   TEXT    NOT NULL,
    bytes  BIGINT  NOT NULL,
    PRIMARY KEY (tenant, name, number, file),
    FOREIGN KEY (tenant, name, number) REFERENCES versions (tenant, name, number)
);
CREATE INDEX version_files_blob ON version_files (blob);

CREATE TABLE datasets (
    id         TEXT    NOT NULL PRIMARY KEY,
    tenant     TEXT    NOT NULL,
    name       TEXT,
    blob       TEXT    NOT NULL,
    format     TEXT    NOT NULL,
    row_count  BIGINT  NOT NULL,
    bytes      BIGINT  NOT NULL,
    created_ms BIGINT  NOT NULL
);
CREATE INDEX datasets_tenant ON datasets (tenant, id);
CREATE INDEX datasets_blob ON datasets (blob);

CREATE TABLE jobs (
    id            TEXT    NOT NULL PRIMARY KEY,
    tenant        TEXT    NOT NULL,
    output_name   TEXT    NOT NULL,
    state         TEXT    NOT NULL,
    request_json  TEXT    NOT NULL,
    resolved_json TEXT    NOT NULL,
    result_json   TEXT,
    created_ms    BIGINT  NOT NULL,
    updated_ms    BIGINT  NOT NULL,
    last_seq      BIGINT  NOT NULL DEFAULT 0
);
CREATE INDEX jobs_tenant ON jobs (tenant, id);
CREATE INDEX jobs_state ON jobs (state);

CREATE TABLE job_events (
    job_id    TEXT    NOT NULL REFERENCES jobs (id),
    seq       BIGINT  NOT NULL,
    at_ms     BIGINT  NOT NULL,
    body_json TEXT    NOT NULL,
    PRIMARY KEY (job_id, seq)
);

-- Blobs that a job keeps alive: its data, its checkpoints.
CREATE TABLE job_blobs (
    job_id TEXT NOT NULL REFERENCES jobs (id),
    name   TEXT NOT NULL,
    blob   TEXT NOT NULL,
    PRIMARY KEY (job_id, name)
);
CREATE INDEX job_blobs_blob ON job_blobs (blob);

CREATE TABLE idempotency (
    tenant          TEXT    NOT NULL,
    idempotency_key TEXT    NOT NULL,
    request_digest  TEXT    NOT NULL,
    job_id          TEXT    NOT NULL REFERENCES jobs (id),
    created_ms      BIGINT  NOT NULL,
    PRIMARY KEY (tenant, idempotency_key)
);
