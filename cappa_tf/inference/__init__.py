"""Trained models in use: opened by one call, asked for what they can."""
