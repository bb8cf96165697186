"""Image files to pixels, with one module per format."""
