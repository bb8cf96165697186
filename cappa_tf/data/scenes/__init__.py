"""A small data set that is drawn on the spot."""
