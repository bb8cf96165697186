"""Weights to numbers: captions, likelihoods, few-shot accuracy."""
