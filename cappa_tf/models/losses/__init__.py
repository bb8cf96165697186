"""Losses of the methods."""
