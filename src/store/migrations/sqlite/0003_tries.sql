-- Starts of the server that began to prepare this waiting job again and did not come to the end of it.
ALTER TABLE jobs ADD COLUMN tries BIGINT NOT NULL DEFAULT 0;
