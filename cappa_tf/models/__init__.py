"""Batches to predictions: encoder, decoder, captioner, generation."""
