"""Export of models: Keras, PyTorch and TensorFlow Serving."""
