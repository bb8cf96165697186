"""Utilities shared by all modules: arguments, files, the terminal."""
