"""Everything that lasts: settings, tables, the life of a job, claims, blobs. Only Postgres."""
