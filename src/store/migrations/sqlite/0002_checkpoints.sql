-- The base that a job was made for; empty: made before this was kept.
ALTER TABLE jobs ADD COLUMN base TEXT NOT NULL DEFAULT '';

-- What a job that has not ended goes on from: at most one, replaced by the next.
CREATE TABLE job_checkpoints (
    job_id  TEXT   NOT NULL PRIMARY KEY REFERENCES jobs (id),
    step    BIGINT NOT NULL,
    blob    TEXT   NOT NULL,
    resumes BIGINT NOT NULL DEFAULT 0   -- starts of the server that went on from it without making a newer one
);
CREATE INDEX job_checkpoints_blob ON job_checkpoints (blob);
