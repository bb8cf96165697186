"""Shards of captioned pictures to batches: what training and evaluation read.

Dimensions:
    B: batch size.
    K: captions an image.
    L: text length.
    H, W: height and width the model takes.
    N: examples of the split.
"""

import math
import os

import tensorflow as tf

from cappa_tf import checks
from cappa_tf.data import (
    arguments,
    decoding,
    description,
    images,
    memory,
    order,
    skips,
    tfrecord,
)

# Below this, records are kept in memory and epochs are full permutations. By
# the size of the data, not of the machine: the order must not depend on it.
RECORDS_IN_MEMORY_BYTES = 256 << 20


class CaptionDataset:
    """One split of a data set written by `tfrecord.write_dataset`.

    The constructor checks its arguments and opens nothing. Both streams give
    dicts of tensors with a static batch size:

        train     "image" float32 [B, H, W, 3] in [-1, 1], "labels" int32
                  [B, L] ([B, K, L] for several captions an image) and "index"
                  int64 [B], the position in the endless stream.
        evaluate  the same, with the index counting the split's records in
                  order, and "_mask" float32 [B]: 0 for padding (and for bad
                  records), 1 for examples.

    Without a tokenizer there are no "labels", records need no caption, and
    "label" int64 [B] (-1 for none) is given.

    The training stream is a function of (seed, start_index) alone: started at
    n it is the stream started at 0 from example n on, and each epoch holds
    every example exactly once (see `order.py`). A bad record (lost, damaged,
    without caption, too large) is skipped, counted and named in the log. Its
    position is given to its neighbour in the batch, so that step times batch
    size stays the position in the stream.

    Args:
        path: Folder of the data set.
        split: Name of the split.
        tokenizer: A `Tokenizer`, or None.
        image_size: H and W, one integer or a pair.
        batch_size: B where `train` and `evaluate` are not told.
        seed: Seed of order, captions and augmentation where `train` is not
            told.
        shuffle: Whether `train` shuffles the records.
        shuffle_buffer: Records held for shuffling where the split is too
            large for memory; changing it changes the order.
        num_readers: Shards read in turns in that case; changing it changes
            the order.
        captions_per_image: K, or "all" for the most any record has. `train`
            draws them (without repetition while a record has enough, then all
            over again); `evaluate` takes the first ones.
        flip: Whether `train` mirrors half of the pictures.
        crop_scale: (least, most) fraction of the area `train` cuts out, or
            None for the whole picture.
        crop_aspect: (least, most) width / height of the cut, relative to the
            picture's.
        shift: Pixels `train` moves the picture at most; not with crop_scale.
        decode_size: Pictures are first resized to this (H, W) and the crop is
            taken from there; by default image_size, or with crop_scale 1.15
            times it.
        resize: "squash" (aspect ratio is lost, as in the recipe) or
            "resize_small_central_crop".
        resize_small: Length of the shorter side for the latter, by default
            256 / 224 of the longer side of image_size.
        antialias: Whether shrinking averages over all pixels.
        reduced_decode: Whether large JPEGs are decoded at 1/2, 1/4 or 1/8,
            the smallest that covers the size wanted. False decodes all pixels
            and takes the four nearest ones, as the recipe does.
        length_buckets: Text lengths: "labels" are cut to the smallest one
            that holds the batch's longest caption. None for always L.
        cache: "stream" reads the shards anew each epoch; "records" holds
            their bytes in memory; "images" holds pixels (decoded and resized,
            uint8) and token ids, and costs nearly nothing after its first
            pass. None decides between the first two by the split's size.
        max_pixels: A picture with more is a bad record.
        max_skipped_fraction: Fraction of bad records above which reading
            stops with an error.
        num_parallel_calls: Threads for decoding; None lets tf.data decide.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str,
        tokenizer,
        image_size: int | tuple | list,
        *,
        batch_size=None,
        seed=0,
        shuffle=True,
        shuffle_buffer=4096,
        num_readers=8,
        captions_per_image: int | str = 1,
        flip=False,
        crop_scale=None,
        crop_aspect=(0.75, 4 / 3),
        shift=0,
        decode_size=None,
        resize="squash",
        resize_small=None,
        antialias=False,
        reduced_decode=True,
        length_buckets=None,
        cache=None,
        max_pixels=25_000_000,
        max_skipped_fraction=0.001,
        num_parallel_calls=None,
    ):
        self.path = os.fspath(path)
        self.split = split
        self.tokenizer = tokenizer
        self.image_size = checks.height_width("image_size", image_size)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.shuffle_buffer = shuffle_buffer
        self.num_readers = num_readers
        self.captions_per_image = captions_per_image
        self.flip = flip
        self.crop_scale = crop_scale
        self.crop_aspect = crop_aspect
        self.shift = shift
        self.resize = resize
        self.antialias = antialias
        self.reduced_decode = reduced_decode
        self.length_buckets = arguments.buckets(length_buckets, tokenizer)
        self.cache = cache
        self.max_pixels = max_pixels
        self.max_skipped_fraction = max_skipped_fraction
        self.num_parallel_calls = num_parallel_calls
        arguments.caption_dataset(self)
        self.decode_size = self._decode_size(decode_size)
        self.resize_small = resize_small or round(
            max(self.image_size) * 256 / 224
        )
        self._description = self._skips = None
        self._records = self._pixels = None
        self._evaluations = {}

    @property
    def description(self):
        """The `DatasetDescription`, read at first use."""
        if self._description is None:
            self._description = description.DatasetDescription.load(self.path)
        return self._description

    @property
    def _shards(self):
        return self.description.shards(self.split)

    @property
    def num_examples(self):
        """N, bad records included."""
        return self.description.num_examples(self.split)

    @property
    def num_captions(self):
        """K: labels an image has in a batch."""
        if self.tokenizer is None:
            return 0
        if self.captions_per_image == "all":
            return self.description.max_captions(self.split)
        return self.captions_per_image

    @property
    def skipped(self):
        """A dict reason -> number of bad records met so far, at any time."""
        return {} if self._skips is None else self._skips.counts

    @property
    def failure(self):
        """The ValueError by which bad records stopped reading, or None."""
        return None if self._skips is None else self._skips.failure

    def train(
        self,
        batch_size=None,
        start_index=0,
        seed=None,
        host=0,
        num_hosts=1,
    ):
        """The endless training stream, or one host's part of it.

        Args:
            batch_size: B; by default the constructor's.
            start_index: Position of the first example.
            seed: By default the constructor's.
            host: Of the positions p, those with p % num_hosts == host.
            num_hosts: Number of hosts that share the stream.

        Returns:
            A tf.data.Dataset of the batches described above.
        """
        batch_size = self._batch_size(batch_size)
        seed = self.seed if seed is None else seed
        checks.check_integer("start_index", start_index, 0)
        self._open()
        batches = self._train_batches(
            batch_size, start_index, seed, host, num_hosts
        )
        diagnose = self._decoder(self.image_size, None).diagnose

        def finish(batch):
            self._skips.report(batch, diagnose, "train", start_index)
            batch = decoding.replace_bad(batch)
            image = images.augment(
                batch["image"],
                self.image_size,
                seed,
                batch["index"],
                flip=self.flip,
                crop_scale=self.crop_scale,
                crop_aspect=self.crop_aspect,
                shift=self.shift,
            )
            return self._finish(batch, image)

        return batches.map(finish, num_parallel_calls=2).prefetch(2)

    def evaluate(self, batch_size=None, host=0, num_hosts=1):
        """One pass over the split in order, the last batch filled up.

        Args:
            batch_size: B; by default the constructor's.
            host: Of the records i, those with i % num_hosts == host.
            num_hosts: Number of hosts that share the split.

        Returns:
            A tf.data.Dataset of the batches described above.
        """
        batch_size = self._batch_size(batch_size)
        key = batch_size, host, num_hosts
        if key not in self._evaluations:
            self._open()
            self._evaluations[key] = self._evaluation(*key)
        return self._evaluations[key]

    def _evaluation(self, batch_size, host, num_hosts):
        """Builds `evaluate`, which repeated evaluations share."""
        share = batch_size * num_hosts
        count = math.ceil(self.num_examples / share) * batch_size
        padding = tf.data.Dataset.from_tensors("").repeat()
        records = (
            order.in_sequence(self._shards)
            .filter(lambda index, serialized: index % num_hosts == host)
            .map(lambda index, serialized: serialized)
            .concatenate(padding)
            .take(count)
            .enumerate()
            .map(lambda i, serialized: (i * num_hosts + host, serialized))
        )
        decoder = self._decoder(self.image_size, None)
        batches = decoder.batches(records, batch_size, self.num_parallel_calls)

        def finish(batch):
            self._skips.report(batch, decoder.diagnose, "evaluate")
            result = self._finish(batch, batch["image"])
            return {**result, "_mask": tf.cast(batch["ok"], tf.float32)}

        return batches.map(finish, num_parallel_calls=2).prefetch(2)

    def read_examples(self, limit=None):
        """The split as Python objects, in the order of `evaluate`.

        Args:
            limit: Most examples to read; None for all.

        Yields:
            `tfrecord.Example`s; example i is index i of `evaluate`. A record
            that is lost has neither image nor captions.
        """
        records = order.in_sequence(self._shards)
        if limit is not None:
            records = records.take(limit)
        for _, serialized in records.prefetch(16).as_numpy_iterator():
            try:
                yield tfrecord.deserialize(serialized)
            except ValueError:
                yield tfrecord.Example(key="", image=b"", captions=[])

    def _train_batches(self, batch_size, start_index, seed, host, num_hosts):
        """Decoded batches in training order, by way of the cache."""
        if self._cache_mode() == "stream":
            records = order.from_readers(
                self._shards,
                seed,
                start_index,
                self.num_readers,
                self.shuffle_buffer if self.shuffle else 0,
            ).filter(lambda index, serialized: index % num_hosts == host)
        else:
            numbers = order.in_memory(
                self.num_examples, seed, start_index, self.shuffle
            ).filter(lambda index, number: index % num_hosts == host)
            if self._cache_mode() == "images":
                pixels = self._pixels_in_memory()
                return numbers.batch(batch_size, drop_remainder=True).map(
                    lambda index, number: pixels.batch(
                        seed, index, number, self.num_captions
                    ),
                    num_parallel_calls=2,
                )
            stored = self._records_in_memory()
            records = numbers.map(
                lambda index, number: (index, tf.gather(stored, number))
            )
        decoder = self._decoder(self.decode_size, seed)
        return decoder.batches(records, batch_size, self.num_parallel_calls)

    def _decoder(self, size, seed, num_captions=None):
        return decoding.RecordDecoder(
            size=size,
            resize=self.resize,
            small=math.ceil(
                self.resize_small * max(size) / max(self.image_size)
            ),
            antialias=self.antialias,
            max_pixels=self.max_pixels,
            num_captions=(
                self.num_captions if num_captions is None else num_captions
            ),
            seed=seed,
            reduced=self.reduced_decode,
        )

    def _finish(self, batch, image):
        """Value range and labels of a decoded batch."""
        result = {
            "image": images.to_model_range(image),
            "index": batch["index"],
        }
        if self.tokenizer is None:
            return {**result, "label": batch["label"]}
        labels = batch.get("tokens")
        if labels is None:
            labels = self.tokenizer(batch["captions"])  # [B, K, L]
        if self.length_buckets is not None:
            labels = _cut(labels, self.length_buckets, self.tokenizer.pad_id)
        if self.captions_per_image == 1:
            labels = labels[:, 0]
        return {**result, "labels": labels}

    def _cache_mode(self):
        """The cache chosen: "stream", "records" or "images"."""
        if self.cache is not None:
            return self.cache
        num_bytes = sum(s.num_bytes for s in self._shards)
        return "records" if num_bytes <= RECORDS_IN_MEMORY_BYTES else "stream"

    def _records_in_memory(self):
        """All records of the split, string [N] on the host."""
        if self._records is None:
            self._records = memory.load_records(self._shards)
        return self._records

    def _pixels_in_memory(self):
        """The decoded split, made at first use."""
        if self._pixels is None:
            wanted = self.tokenizer is not None
            most = wanted * self.description.max_captions(self.split)
            self._pixels = memory.DecodedImages(
                self._shards,
                self._decoder(self.decode_size, None, most),
                self.tokenizer,
                name=f"{self.path} {self.split}",
            )
        return self._pixels

    def _open(self):
        """Opens description and vocabulary; checks the shards' sizes."""
        if self.tokenizer is not None:
            self.tokenizer.load()
        if self._skips is None:
            self._skips = skips.SkipCounter(
                self.max_skipped_fraction,
                self.num_examples,
                f"{self.path} {self.split}",
            )
            skips.check_shards(
                self.description, self.split, self.max_skipped_fraction
            )

    def _batch_size(self, batch_size):
        checks.check_integer("batch_size", batch_size or self.batch_size, 1)
        return batch_size or self.batch_size

    def _decode_size(self, decode_size):
        """The size pictures are held at before cropping."""
        if decode_size is not None:
            return checks.height_width("decode_size", decode_size)
        scale = 1.0 if self.crop_scale is None else 1.15
        return tuple(round(side * scale) for side in self.image_size)


def _cut(labels, buckets, pad_id):
    """Cuts int32 [B, K, L] to the least of `buckets` that holds all tokens."""
    longest = tf.reduce_max(
        tf.reduce_sum(tf.cast(labels != pad_id, tf.int32), axis=-1)
    )
    buckets = tf.constant(buckets)
    length = tf.reduce_min(tf.boolean_mask(buckets, buckets >= longest))
    return labels[..., :length]
