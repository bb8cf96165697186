"""Compositional understanding: right captions against similar wrong ones."""
