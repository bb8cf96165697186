"""CapPa in TensorFlow and Keras 3: vision encoders pretrained by captioning.

The public names below are imported when they are first used (PEP 562), so that
`import cappa_tf` is fast: TensorFlow takes several seconds to load. The classes
of saved models are registered with Keras as soon as Keras is imported, before
or after this package, so that `keras.saving.load_model` opens them.
"""

import importlib

import wrapt

__version__ = "0.1.0"

_PUBLIC = {
    "Adafactor": "cappa_tf.training.optimizers.adafactor",
    "AdamW": "cappa_tf.training.optimizers.adamw",
    "BagOfTokens": "cappa_tf.models.bag_of_tokens",
    "CaptionDataset": "cappa_tf.data.caption_dataset",
    "Captioner": "cappa_tf.models.captioner",
    "Classifier": "cappa_tf.models.classifier",
    "ComputeSettings": "cappa_tf.training.settings",
    "Contrastive": "cappa_tf.models.contrastive",
    "ContrastiveCaptioner": "cappa_tf.models.contrastive_captioner",
    "Cosine": "cappa_tf.training.optimizers.schedules",
    "DatasetDescription": "cappa_tf.data.schema",
    "EvaluationSettings": "cappa_tf.training.settings",
    "Predictor": "cappa_tf.inference.predictor",
    "Pretrained": "cappa_tf.presets",
    "RunSettings": "cappa_tf.training.settings",
    "SelfCriticalCaptioner": "cappa_tf.models.self_critical",
    "TextDecoder": "cappa_tf.models.text_decoder",
    "TextEncoder": "cappa_tf.models.text_encoder",
    "Tokenizer": "cappa_tf.data.tokenizer",
    "VisionEncoder": "cappa_tf.models.vision_encoder",
    "WeightSettings": "cappa_tf.training.settings",
    "from_preset": "cappa_tf.presets",
    "load_backbone": "cappa_tf.export.keras_backbone",
    "open_encoder": "cappa_tf.saving.encoders",
    "train": "cappa_tf.training.train",
    "variant": "cappa_tf.models.sizes",
    "write_dataset": "cappa_tf.data.schema",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    """Imports the module of a public name and returns the name from it."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cappa_tf' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


@wrapt.when_imported("keras")
def _register(keras):
    """Registers the classes of saved models with Keras."""
    del keras
    importlib.import_module("cappa_tf.models")


def __dir__():
    return sorted({*globals(), *_PUBLIC})
