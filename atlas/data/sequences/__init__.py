"""Token shards → sequences → batches."""
