"""Evaluation: captions, likelihoods, retrieval, classification."""
