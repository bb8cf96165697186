"""Scenes: a small synthetic data set that is rendered locally."""
