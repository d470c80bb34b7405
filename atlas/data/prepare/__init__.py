"""Documents → token shards."""
