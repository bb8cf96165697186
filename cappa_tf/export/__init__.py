"""Weights to and from other people's programs."""
