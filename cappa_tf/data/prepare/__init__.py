"""Preparation of data: images and captions to shards."""
