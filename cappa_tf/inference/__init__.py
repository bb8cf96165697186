"""Inference with trained models: features, captions and scores."""
