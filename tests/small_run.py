"""A small run of the real captioner on real shards."""

import dataclasses
import io
import os

import numpy as np
import tensorflow as tf
import tiny
from PIL import Image

from cappa_tf.data import schema
from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.images import mixing
from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer
from cappa_tf.evaluation.perplexity import Perplexity
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.classifier import Classifier
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.training import trainer as run_module
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.optimizers.multipliers import ByDepth
from cappa_tf.training.optimizers.sgd import SGD
from cappa_tf.training.train import train

SIDE = 16
LENGTH = 8
STEPS = 20
BATCH = 8
COLOURS = ("red", "green", "blue", "black", "white")
THINGS = ("box", "sea", "dog", "tree")


def _example(i):
    random = np.random.RandomState(i)
    pixels = random.randint(256, size=(SIDE, SIDE, 3)).astype("uint8")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    words = [random.choice(COLOURS), random.choice(THINGS)]
    captions = [
        " ".join(words[: 1 + j % 2] * (1 + j)) for j in range(1 + i % 3)
    ]
    return schema.Example(key=f"{i}", image=file.getvalue(), captions=captions)


def write_data(folder):
    """Writes 37 training and 11 evaluation examples, and a vocabulary."""
    splits = {"train": range(37), "val": range(100, 111)}
    examples = {k: [_example(i) for i in v] for k, v in splits.items()}
    schema.write_dataset(examples, folder, "small", 3)
    captions = [f"{a} {b}" for a in COLOURS for b in THINGS] * 2
    train_tokenizer(captions, os.path.join(folder, "tokenizer.model"), 40)


def write_labelled(folder, labels=range(5)):
    """Writes 37 training and 11 evaluation examples with labels in turn."""
    labels = list(labels)
    examples = {
        split: [
            dataclasses.replace(_example(i), label=labels[i % len(labels)])
            for i in numbers
        ]
        for split, numbers in {
            "train": range(37),
            "val": range(100, 111),
        }.items()
    }
    schema.write_dataset(examples, folder, "small", 3)


def labelled(folder, split="train", tokenizer=None, **options):
    """A `CaptionDataset` of what `write_labelled` wrote."""
    return CaptionDataset(folder, split, tokenizer, SIDE, **options)


def all_augmentations():
    """All kinds of augmentation with KerasCV."""
    from cappa_tf.data.images import keras_cv_augmentation as kcv

    return [
        kcv.RandomCropAndResize(SIDE, scale=(0.3, 1.0)),
        kcv.RandAugment(),
        kcv.RandomCutout(),
        mixing.OneOf([mixing.Mixup(0.8), kcv.MixUp(0.8), kcv.CutMix()]),
    ]


def make_classifier(num_classes=5):
    """A classifier with all that fine-tuning has of random choices."""
    return Classifier(
        VisionEncoder(
            hidden_dim=16,
            num_layers=2,
            num_heads=2,
            mlp_dim=32,
            patch_size=8,
            image_size=SIDE,
            dropout=0.1,
            stochastic_depth=0.3,
        ),
        num_classes,
        label_smoothing=0.1,
    )


def finetuning_run(folder, workdir, augmentations=None, **overrides):
    """Fine-tunes with layer-wise decay, averaged weights and augmentation."""
    if augmentations is None:
        augmentations = all_augmentations()
    arguments = {
        "model": make_classifier,
        "optimizer": lambda: SGD(
            0.1, multipliers=ByDepth(0.5), use_ema=True, ema_momentum=0.9
        ),
        "train_data": labelled(folder, augmentations=augmentations, flip=True),
        "eval_data": labelled(folder, "val"),
        "final_evaluation": True,
        **overrides,
    }
    return run(folder, workdir, **arguments)


def data(folder, split="train", **options):
    """A `CaptionDataset` of what `write_data` wrote."""
    return CaptionDataset(
        folder, split, Tokenizer(folder, LENGTH), SIDE, **options
    )


def make_model(folder, remat=False, num_layers=1, **kwargs):
    """A captioner that uses all kinds of random choices."""
    small = {
        "hidden_dim": 16,
        "num_layers": num_layers,
        "num_heads": 2,
        "mlp_dim": 32,
        "remat": remat,
    }
    return Captioner(
        VisionEncoder(
            patch_size=8,
            image_size=SIDE,
            dropout=0.1,
            patch_dropout=0.25,
            **small,
        ),
        TextDecoder(
            vocabulary_size=Tokenizer(folder, LENGTH).vocabulary_size,
            max_length=LENGTH,
            dropout=0.1,
            **small,
        ),
        masked_pred_prob=0.5,
        masking_ratio=0.5,
        chunk_size=64,
        **kwargs,
    )


def run(folder, workdir, **overrides):
    """Trains; returns the result of `train`.

    Args:
        folder: Of the data.
        workdir: Of the run.
        **overrides: Arguments and settings of `train`, and `evaluate`:
            whether to measure perplexity while it trains.
    """
    folder, workdir = str(folder), str(workdir)
    arguments = {
        "model": lambda: make_model(folder),
        # The gradient of a key's bias is zero but for rounding; divided by
        # its own size it would be noise.
        "optimizer": lambda: Adafactor(
            0.01, epsilon=1e-3, momentum_dtype="float32"
        ),
        "train_data": data(folder),
        "eval_data": data(folder, "val"),
        "total_steps": STEPS,
        "batch_size": BATCH,
        "eval_batch_size": 4,
        "steps_per_loop": 5,
        "log_steps": 1,
        "eval_steps": 10,
        "checkpoint_steps": 5,
        "sample_images": 3,
        "image_use_images": 0,
        "sheet_images": 5,
        "deterministic": True,
        "strategy": "one",
    }
    if overrides.pop("evaluate", False):
        arguments["evaluators"] = [Perplexity(folder, "val", blind=True)]
        arguments["evaluator_steps"] = 10
    arguments = tiny.with_settings(**arguments | overrides)
    return train(workdir=workdir, **arguments)


def plain_run(folder, workdir):
    """Trains without evaluation, saves every other step; deterministic."""
    run(
        folder,
        workdir,
        eval_data=None,
        final_evaluation=False,
        checkpoint_steps=2,
    )


def compiled_run(folder, workdir):
    """Trains with XLA on captions cut to three lengths, in microbatches."""
    run(
        folder,
        workdir,
        train_data=data(folder, length_buckets=(3, 5)),
        eval_data=None,
        final_evaluation=False,
        batch_size=4,
        accumulation_steps=2,
        jit_compile=True,
        model=lambda: make_model(folder, remat=True),
    )


def worker(index, folder, workdir, blow=None, sample_images=0):
    """A host of a run on several.

    Args:
        index: Which.
        folder: Of the data.
        workdir: Of the run.
        blow: Optional (host, step, signal): what that host sends itself after
            that step.
        sample_images: See `EvaluationSettings`.
    """
    if blow is not None and blow[0] == index:
        signal_after(*blow[1:])
    figures = run(
        folder,
        workdir,
        strategy="auto",
        sample_images=sample_images,
        evaluate=True,
    )
    print("figures", figures, flush=True)


def contrastive_run(folder, workdir, strategy="one"):
    """Trains two towers, without saving before the end."""
    run(
        folder,
        workdir,
        # Not before the hosts have met: a tokenizer runs an operation.
        model=lambda: tiny.make_contrastive(
            Tokenizer(folder, LENGTH).vocabulary_size, dropout=0.1
        ),
        checkpoint_steps=STEPS,
        eval_steps=STEPS,
        eval_data=None,
        final_evaluation=False,
        deterministic=False,
        strategy=strategy,
    )


def contrastive_worker(index, folder, workdir):
    """A host of a contrastive run on several."""
    del index
    contrastive_run(folder, workdir, strategy="auto")


def signal_after(step, number):
    """Makes this process send itself a signal after `step` steps."""
    real = run_module.Trainer._between_loops

    def between(self, interval):
        if self.step == step:
            os.kill(os.getpid(), number)
        real(self, interval)

    run_module.Trainer._between_loops = between


def logged(workdir, tag):
    """Scalars of TensorBoard: a dict from step to value."""
    folder = os.path.join(workdir, "tensorboard")
    return {
        event.step: float(tf.make_ndarray(value.tensor))
        for name in sorted(os.listdir(folder))
        if "tfevents" in name  # A profile is a folder beside it.
        for event in tf.compat.v1.train.summary_iterator(
            os.path.join(folder, name)
        )
        for value in event.summary.value
        if value.tag == tag
    }


def saved(workdir, step=STEPS):
    """Arrays of a checkpoint, by name."""
    path = os.path.join(workdir, "checkpoints", f"step-{step}")
    reader = tf.train.load_checkpoint(path)
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.startswith("variables/")
    }
