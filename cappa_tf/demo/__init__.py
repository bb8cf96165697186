"""Demo: a page on this machine that captions images with a trained model."""
