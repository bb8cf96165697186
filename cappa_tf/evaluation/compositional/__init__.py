"""Right captions against wrong ones of the same words."""
