"""Studies: several methods trained and evaluated alike, and their report."""
