"""Data: sources, records, images, text and the input pipeline."""
