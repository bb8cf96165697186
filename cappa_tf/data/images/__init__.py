"""Image files to pixels, one module a format."""
