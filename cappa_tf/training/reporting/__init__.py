"""Figures of a run: terminal, log file, TensorBoard."""
