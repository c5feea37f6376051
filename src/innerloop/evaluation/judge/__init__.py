"""The judge of a run of the service: what came out, held against a single-threaded fold of what went in."""
