"""Records to batches: shuffled, decoded, bad ones skipped and counted."""
