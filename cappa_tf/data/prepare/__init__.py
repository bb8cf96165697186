"""Images and captions to shards: what tools/prepare_data.py does."""
