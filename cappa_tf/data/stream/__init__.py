"""Streams of records: shuffling, decoding, caching, bad records."""
