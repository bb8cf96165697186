"""Bytes to batches: sources, records, images, text, pipeline."""
