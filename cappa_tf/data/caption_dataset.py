"""Data set of captioned images, in batches for training and evaluation.

Dimensions:
    B: batch size.
    K: captions per image.
    L: text length.
    H, W: height and width the model takes.
    N: examples of the split.
"""

import copy
import math
import os

import tensorflow as tf

from cappa_tf.data import dataset_arguments, text_lengths
from cappa_tf.data import prompts as prompts_lib
from cappa_tf.data.images import augmentation, decode_resize
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.sources import base, prepared
from cappa_tf.data.stream import (
    bad_records,
    caching,
    decoding,
    features,
    shuffling,
    stateless_random,
)
from cappa_tf.utils import arguments


class CaptionDataset:
    """One split of a source: a folder of prepared data, or any other.

    The constructor checks its arguments and opens nothing. Both streams yield
    dicts of tensors with a static batch size:

        train     "image" float32 [B, H, W, 3] in [-1, 1], "labels" int32
                  [B, K, L], K captions per image, and "index" int64 [B], the
                  position in the endless stream.
        evaluate  the same, with the index counting the split's records in
                  order, and "_mask" float32 [B]: 0 for padding (and for bad
                  records), 1 for examples.

    If captions answer prompts, there is also "prompt_lengths" int32 [B, K]:
    "labels" begin with the tokens of the prompt, and this is their number. A
    caption whose prompt leaves no room for it is left out and counted.

    Without a tokenizer there is "label" int64 [B] (-1 for none) in place of
    "labels", and records need no caption.

    The training stream is a function of (seed, start_index) alone: started at
    n it equals the stream started at 0 from example n on, and each epoch holds
    every example exactly once (`shuffling.py`; in a mixture this holds for
    each source, `mixture.py`). A bad record (lost, damaged, without caption,
    too large) is skipped, counted and named in the log. Its neighbor in the
    batch takes its place, so that step times batch size remains the position
    in the stream.

    Args:
        path: Folder of the data set that tools/prepare_data.py wrote, folder
            of images (`image_folder.ImageFolder`), or a source as defined in
            `sources/base.py`.
        split: Name of the split.
        tokenizer: A `Tokenizer`, or None.
        image_size: H and W, one integer or a pair.
        batch_size: Default B of `train` and `evaluate`.
        seed: Default seed of `train` for order, captions and augmentation.
        shuffle: Whether `train` shuffles the records.
        shuffle_buffer: Records held for shuffling if the split is too large
            for memory; changing it changes the order.
        num_readers: Shards read in turn in that case; changing it changes the
            order.
        captions_per_image: K, or "all" for the maximum of any record. `train`
            samples them (without repetition while a record has enough, then
            from all again); `evaluate` takes the first ones.
        max_words: Maximum number of words, separated by spaces, of the
            captions that `train` samples; of an image that has only longer
            ones it takes the shortest. None for no limit. `evaluate` uses all.
        flip: Whether `train` mirrors half of the images.
        crop_scale: (min, max) fraction of the area that `train` crops, or
            None for the whole image.
        crop_aspect: (min, max) width / height of the crop, relative to the
            image's.
        shift: Maximum number of pixels by which `train` shifts the image; not
            with crop_scale.
        augmentations: List of further augmentations of `train`, in order, such
            as those of `images.keras_cv_augmentation` and `images.mixing`.
            One that mixes images is the last; batches then also have
            "mix_label" int64 [B] and "mix_weight" float32 [B].
        decode_size: Size (H, W) to which images are resized before cropping;
            by default image_size, or 1.15 times that if they are cropped.
        resize: "squash" (aspect ratio is lost, as in the recipe) or
            "resize_small_central_crop".
        resize_small: Length of the shorter side for the latter, by default
            256 / 224 of the longer side of image_size.
        antialias: Whether downsizing averages over all pixels.
        reduced_decode: Whether large JPEGs are decoded at 1/2, 1/4 or 1/8, the
            smallest scale that covers the requested size. False decodes all
            pixels and interpolates the four nearest ones, as in the recipe.
        length_buckets: Text lengths; "labels" are cut to the smallest one that
            holds the batch's longest caption. None always uses L. "auto" cuts
            those of `train` to lengths chosen from the counts that
            `train_tokenizer` wrote beside the vocabulary, if there are any, and
            unless `train` is asked for a fixed length.
        cache: "stream" reads the shards again in each epoch; "records" keeps
            their bytes in memory; "images" keeps pixels (decoded and resized,
            uint8) and token ids, and takes nearly no time after its first
            pass. None decides between the first two by the split's size.
        max_pixels: Maximum size of an image; a larger one is a bad record.
        max_skipped_fraction: Fraction of bad records above which reading
            stops with an error.
        num_parallel_calls: Threads for decoding; None lets tf.data decide.
        preprocessing: The `ImagePreprocessing` of a model, in place of
            image_size, resize, resize_small, antialias, reduced_decode and
            max_pixels, which describe one.
        prompt: What the captions answer: text such as "caption:", or a
            template such as "answer: {question}" with a place for the question
            of the record (`data/prompts.py`). By default the question itself,
            if the records have questions. A `Mixture` has one for each of its
            sources, which here are its records' questions.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str,
        tokenizer,
        image_size: int | tuple | list | None = None,
        *,
        batch_size=None,
        seed=0,
        shuffle=True,
        shuffle_buffer=4096,
        num_readers=8,
        captions_per_image: int | str = 1,
        max_words=None,
        flip=False,
        crop_scale=None,
        crop_aspect=(0.75, 4 / 3),
        shift=0,
        augmentations: tuple | list = (),
        decode_size=None,
        resize="squash",
        resize_small=None,
        antialias=False,
        reduced_decode=True,
        length_buckets: list | tuple | str | None = None,
        cache=None,
        max_pixels=25_000_000,
        max_skipped_fraction=0.001,
        num_parallel_calls=None,
        preprocessing=None,
        prompt: str | None = None,
    ):
        self.source = prepared.as_source(path)
        self.path = self.source.name
        self.split = split
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing or ImagePreprocessing(
            image_size=image_size,
            resize=resize,
            resize_small=resize_small,
            antialias=antialias,
            reduced_decode=reduced_decode,
            max_pixels=max_pixels,
        )
        self.image_size = self.preprocessing.image_size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.shuffle_buffer = shuffle_buffer
        self.num_readers = num_readers
        self.captions_per_image = captions_per_image
        self.max_words = max_words
        self.flip = flip
        self.crop_scale = crop_scale
        self.crop_aspect = crop_aspect
        self.shift = shift
        self.augmentations = list(augmentations)
        self.length_buckets = dataset_arguments.buckets(
            length_buckets, tokenizer
        )
        self.cache = cache
        self.prompt = prompt
        self.max_skipped_fraction = max_skipped_fraction
        self.num_parallel_calls = num_parallel_calls
        dataset_arguments.caption_dataset(self)
        crops = any(a.crops for a in self.augmentations)
        self.decode_size = dataset_arguments.decode_size(
            decode_size, self.image_size, crop_scale is not None or crops
        )
        # What comes before an augmentation that crops leaves the size as it is.
        self._augmented_size = self.decode_size if crops else self.image_size
        self._num_classes = None
        self._records = self._skips = self._pixels = None
        self._evaluations = {}
        self._table = None

    def with_features(self, table):
        """The same data set with features in place of images.

        Its batches have "image_features" float32 [B, ...] instead of "image";
        all else is the same, including the order. No record is read.

        Args:
            table: `inference.feature_cache.FeatureCache` of this data set.

        Returns:
            A `CaptionDataset` that shares the counts of bad records.

        Raises:
            ValueError: If images are augmented.
        """
        self.check_unaugmented()
        self._open()
        other = copy.copy(self)
        other._table, other._evaluations = table, {}
        return other

    def check_unaugmented(self):
        """Refuses augmentation, for which one feature an image is not enough.

        Raises:
            ValueError: Images are augmented; it names the argument.
        """
        for name, value in (
            ("flip", self.flip),
            ("crop_scale", self.crop_scale),
            ("shift", self.shift),
            ("augmentations", self.augmentations),
            (
                "decode_size",
                self.decode_size != self.image_size and self.decode_size,
            ),
        ):
            if value:
                macro = "FLIP, " if name == "flip" else ""
                raise ValueError(
                    "Cached features (FEATURES='cached') are those of images "
                    f"that are not augmented: unset {macro}"
                    f"train/CaptionDataset.{name}. Received: {name}={value!r}"
                )

    @property
    def records(self):
        """The split's `base.Records`, opened at first use."""
        if self._records is None:
            self._records = self.source.split(self.split)
        return self._records

    @property
    def num_examples(self):
        """N, including bad records."""
        return self.records.num_examples

    @property
    def max_captions(self):
        """Maximum number of captions of a record."""
        return self.records.max_captions

    @property
    def num_captions(self):
        """K, the number of captions of an image in a batch."""
        if self.tokenizer is None:
            return 0
        if self.captions_per_image == "all":
            return self.max_captions
        return self.captions_per_image

    @property
    def prompts(self):
        """Templates of the prompts that captions answer; none without any."""
        if self.tokenizer is None:
            return ()
        prompts_lib.check_questions(self.prompt, self.records)
        return prompts_lib.composed(self.prompt, self.records.prompts)

    @property
    def _prompts(self):
        """The `Prompts` of the captions, or None."""
        if not self.prompts:
            return None
        return prompts_lib.Prompts(self.prompt, self.tokenizer)

    @property
    def skipped(self):
        """Dict reason -> number of bad records found so far."""
        return {} if self._skips is None else self._skips.counts

    @property
    def noted(self):
        """The part of `skipped` that was found when the split was listed."""
        return {} if self._skips is None else self._skips.noted

    @property
    def failure(self):
        """The ValueError with which bad records stopped reading, or None."""
        return None if self._skips is None else self._skips.failure

    @property
    def mixes(self):
        """Whether `train` mixes the images of a step."""
        return any(a.mixes for a in self.augmentations)

    def check_labels(self, num_classes):
        """Refuses labels that a model does not have; names absent classes.

        Labels are counted before anything is read where the source knows their
        number or is small; otherwise `train` and `evaluate` stop at the first
        label that the model does not have.

        Args:
            num_classes: Number of the model's classes, from 0.

        Returns:
            List of the classes of which the split has no image; [] if that is
            not known.

        Raises:
            ValueError: No record has a label, or one has a label that the
                model does not have.
        """
        self._num_classes = num_classes
        counts = self.records.label_counts()
        if counts is None:
            return []
        if not counts:
            raise ValueError(
                "A classifier needs images with labels. Received: "
                f"{self.records.name}, where no record has one"
            )
        beyond = {k: n for k, n in counts.items() if k >= num_classes}
        if beyond:
            raise self._beyond(sorted(beyond), sum(beyond.values()))
        return sorted(set(range(num_classes)) - counts.keys())

    def _beyond(self, labels, records):
        return ValueError(
            "Labels must be below NUM_CLASSES (Classifier.num_classes), as "
            f"classes are numbered from 0. Received: num_classes="
            f"{self._num_classes}, and in {self.records.name} {records} "
            f"record(s) with label {arguments.ranges(labels)}"
        )

    @tf.autograph.experimental.do_not_convert
    def train(
        self,
        batch_size=None,
        start_index=0,
        seed=None,
        host=0,
        num_hosts=1,
        step_size=None,
        fixed_length=False,
    ):
        """The endless training stream.

        Several hosts share one stream: position P goes to host P % num_hosts.
        So the batches of all hosts together are those of one host with a batch
        of their total size. A host reads only its own records if the number of
        hosts divides `num_readers`.

        Args:
            batch_size: B, of this host; by default the constructor's.
            start_index: Position of the first example, over all hosts.
            seed: Seed of the stream; by default the constructor's.
            host: Index of this host.
            num_hosts: Number of hosts that share the stream.
            step_size: Examples of a training step, over all hosts and devices,
                a multiple of their batches; each host mixes its own part. By
                default one batch of each host.
            fixed_length: Whether length_buckets="auto" stands for L.

        Returns:
            A `tf.data.Dataset` of the batches described in the class.
        """
        batch_size = self._batch_size(batch_size)
        step_size = step_size or batch_size * num_hosts
        # Examples that are augmented together: those of a step, if mixed.
        together = step_size // num_hosts if self.mixes else batch_size
        seed = self.seed if seed is None else seed
        arguments.check_integer("start_index", start_index, 0)
        dataset_arguments.hosts(host, num_hosts)
        self._open()
        reading = base.Reading(
            seed,
            self.shuffle,
            self.shuffle_buffer,
            self.num_readers,
            self.cache,
            host,
            num_hosts,
        )
        batches = self._train_batches(together, start_index, reading)
        left_out = getattr(self._prompts, "too_long", None)
        diagnose = self._decoder(self.image_size, None).diagnose
        if self._table is not None:
            diagnose = features.diagnose
        buckets = self._buckets(batch_size, fixed_length)

        def finish(batch):
            self._skips.report(
                batch, diagnose, "train", start_index, num_hosts, left_out
            )
            batch = decoding.replace_bad(batch)
            if self._table is not None:
                return self._finish(batch, buckets)
            image = augmentation.augment(
                batch["image"],
                self._augmented_size,
                seed,
                batch["index"],
                flip=self.flip,
                crop_scale=self.crop_scale,
                crop_aspect=self.crop_aspect,
                shift=self.shift,
            )
            batch = {**batch, "image": image}
            if self.augmentations:
                batch = self._augment(batch, seed, start_index, step_size)
            return self._finish(batch, buckets)

        batches = batches.map(finish, num_parallel_calls=2)
        if together != batch_size:
            batches = batches.flat_map(
                lambda batch: _split(batch, together // batch_size)
            )
        return batches.prefetch(2)

    def _augment(self, batch, seed, start_index, step_size):
        """Applies the `augmentations` to a batch of one step."""
        first = batch["index"][0] - start_index
        step = start_index + first // step_size * step_size
        image = tf.cast(batch["image"], tf.float32)
        batch = {**batch, "image": image}
        for place, augment in enumerate(self.augmentations):
            batch = augment(
                batch, stateless_random.Draws(seed, batch["index"], step, place)
            )
        shape = (None, *self.image_size, 3)
        return {**batch, "image": tf.ensure_shape(batch["image"], shape)}

    @tf.autograph.experimental.do_not_convert
    def evaluate(self, batch_size=None, host=0, num_hosts=1):
        """One pass over the split in order, with the last batch padded.

        Args:
            batch_size: B, of this host; by default the constructor's.
            host: Index of this host.
            num_hosts: Number of hosts that share the records: host h gets
                those with index % num_hosts == h, in the same number of
                batches as the others.

        Returns:
            A `tf.data.Dataset` of the batches described in the class.
        """
        key = (self._batch_size(batch_size), host, num_hosts)
        dataset_arguments.hosts(host, num_hosts)
        if key not in self._evaluations:
            self._open()
            self._evaluations[key] = self._evaluation(*key)
        return self._evaluations[key]

    def _evaluation(self, batch_size, host, num_hosts):
        """Builds `evaluate`, which repeated evaluations share."""
        most = math.ceil(self.num_examples / num_hosts)  # of one host
        count = math.ceil(most / batch_size) * batch_size

        def of_host(stream, padding):
            """(position, record) of this host, as many as of the others."""
            padding = tf.data.Dataset.from_tensors(padding).repeat()
            stream = stream.concatenate(padding).enumerate()
            return stream.shard(num_hosts, host).take(count)

        decoder = self._decoder(self.image_size, None)
        left_out = getattr(decoder.prompts, "too_long", None)
        diagnose = decoder.diagnose
        buckets = self._buckets(batch_size, fixed_length=True)
        if self._table is not None:
            numbers = tf.data.Dataset.range(self.num_examples)
            numbers = of_host(numbers, tf.constant(-1, tf.int64))
            batches = features.batches(
                self._table, decoder, numbers, batch_size
            )
            diagnose = features.diagnose
        else:
            records = shuffling.in_sequence(self.records)
            stream = of_host(records.map(lambda index, record: record), "")
            batches = decoder.batches(
                stream, batch_size, self.num_parallel_calls
            )

        def finish(batch):
            self._skips.report(batch, diagnose, "evaluate", left_out=left_out)
            mask = tf.cast(batch["ok"], tf.float32)
            return {**self._finish(batch, buckets), "_mask": mask}

        return batches.map(finish, num_parallel_calls=2).prefetch(2)

    @tf.autograph.experimental.do_not_convert
    def records_with_images(self, first, count, batch_size):
        """Decoded records in the order of the files, for `FeatureCache`.

        Args:
            first: Number of the first record.
            count: How many.
            batch_size: B.

        Returns:
            A tf.data.Dataset of what `RecordDecoder.decode_records` gives for
            B records, with "image" float32 [B, H, W, 3] in [-1, 1] and
            "captions" and "prompts" as they are stored. The last batch is
            filled up.
        """
        decoder = self._decoder(self.image_size, None)
        records = shuffling.in_sequence(self.records, first, count)
        # A batch of another size would be a second graph.
        padding = tf.data.Dataset.from_tensors("").repeat(-count % batch_size)

        def decode(serialized):
            batch = decoder.decode_records(serialized)
            image = decode_resize.to_model_range(batch["image"])
            return {**batch, "image": image}

        return (
            records.map(lambda _, serialized: serialized)
            .concatenate(padding)
            .batch(batch_size, drop_remainder=True)
            .map(
                decode,
                num_parallel_calls=self.num_parallel_calls or tf.data.AUTOTUNE,
            )
            .prefetch(2)
        )

    def diagnose(self, raw):
        """Says what is wrong with a record's image: (reason, name)."""
        return self._decoder(self.image_size, None, 0).diagnose(raw)

    @property
    def identity(self):
        """What tells the images of this split from all others: JSON."""
        return {
            "data": self.records.identity,
            "split": self.split,
            "preprocessing": self.preprocessing.to_json(),
        }

    def read_examples(self, limit=None):
        """The split as Python objects, in the order of `evaluate`.

        Args:
            limit: Maximum number of examples to read; None for all.

        Returns:
            An iterator of `schema.Example`s; example i has the index i in
            `evaluate`. A bad record has neither image nor captions. If
            captions answer prompts, `prompts` are those, with the template
            filled in, and captions that are left out are not there.
        """
        examples = self.records.read_examples(limit)
        prompts = self._prompts
        return examples if prompts is None else map(prompts.usable, examples)

    def read_captions(self, limit):
        """Reads all captions of a random part of the split, without images.

        Args:
            limit: Maximum number of records to read.

        Yields:
            A list of captions for each record of a shuffled epoch, which the
            constructor's seed determines, up to `limit` records. Records that
            cannot be parsed are left out.
        """
        reading = base.Reading(
            self.seed,
            self.shuffle,
            self.shuffle_buffer,
            self.num_readers,
            self.cache,
        )
        records = self.records.stream(reading, 0)
        records = records.take(min(limit, self.num_examples)).prefetch(16)
        for _, serialized in records.as_numpy_iterator():
            try:
                captions = self.records.deserialize(serialized).captions
            except ValueError:  # `train` counts it.
                continue
            captions = [caption.strip() for caption in captions]
            yield [caption for caption in captions if caption]

    def _train_batches(self, batch_size, start_index, reading):
        """Decoded batches in training order, from the cache if there is one."""
        if self._table is not None:
            # Pixels in memory are in the order of numbers, see below.
            images = self.cache == "images"
            order = self.records.numbers if images else self.records.order
            decoder = self._decoder(
                self.image_size, reading.seed, max_words=self.max_words
            )
            return features.batches(
                self._table, decoder, order(reading, start_index), batch_size
            )
        if self.cache == "images":
            numbers = self.records.numbers(reading, start_index)
            pixels = self._pixels_in_memory()
            return numbers.batch(batch_size, drop_remainder=True).map(
                lambda index, number: pixels.batch(
                    reading.seed, index, number, self.num_captions
                ),
                num_parallel_calls=2,
            )
        stream = self.records.stream(reading, start_index)
        decoder = self._decoder(
            self.decode_size, reading.seed, max_words=self.max_words
        )
        return decoder.batches(stream, batch_size, self.num_parallel_calls)

    def _decoder(self, size, seed, num_captions=None, max_words=None):
        return decoding.RecordDecoder(
            self.preprocessing.scaled(size),
            num_captions=(
                self.num_captions if num_captions is None else num_captions
            ),
            seed=seed,
            max_words=max_words,
            records=self.records,
            prompts=self._prompts,
        )

    def _buckets(self, batch_size, fixed_length):
        """Lengths to cut the labels of a batch to, or None."""
        if self.length_buckets != "auto":
            return self.length_buckets
        counts = None
        if not fixed_length:
            counts = text_lengths.read(self.tokenizer.path)
        if counts is None:
            return None
        chosen = text_lengths.choose(
            counts, self.tokenizer.max_length, batch_size * self.num_captions
        )
        return chosen if len(chosen) > 1 else None

    def _finish(self, batch, buckets):
        """Converts a decoded batch to the model's value range and labels."""
        result = {"index": batch["index"]}
        if self._table is not None:
            result["image_features"] = batch["image_features"]
        else:
            result["image"] = decode_resize.to_model_range(batch["image"])
        if self.tokenizer is None:
            for name in ("label", "mix_label", "mix_weight"):
                if name in batch:
                    result[name] = batch[name]
            return self._with_known_labels(result)
        labels, lengths = batch.get("tokens"), batch.get("prompt_lengths")
        if labels is None and "prompts" in batch:
            labels, lengths = self.tokenizer.with_prompts(
                batch["prompts"], batch["captions"]
            )
        elif labels is None:
            labels = self.tokenizer(batch["captions"])  # [B, K, L]
        if lengths is not None:
            result["prompt_lengths"] = lengths
        if buckets is not None:
            labels = _cut(labels, buckets, self.tokenizer.pad_id)
        return {**result, "labels": labels}

    def _with_known_labels(self, batch):
        """Stops at a label that the model of `check_labels` does not have."""
        if self._num_classes is None:
            return batch
        label = batch["label"]
        beyond = label >= self._num_classes

        @tf.autograph.experimental.do_not_convert
        def stop(labels):
            found = sorted({int(label) for label in labels.numpy()})
            self._skips.failure = self._beyond(found, len(labels))
            raise self._skips.failure

        known = tf.cond(
            tf.reduce_any(beyond),
            lambda: tf.py_function(stop, [label[beyond]], tf.int64),
            lambda: tf.constant(0, tf.int64),
        )
        with tf.control_dependencies([known]):
            return {**batch, "label": tf.identity(label)}

    def _pixels_in_memory(self):
        """The decoded split, created at first use."""
        if self._pixels is None:
            wanted = self.tokenizer is not None
            most = self.max_captions if wanted else 0
            self._pixels = caching.DecodedImages(
                self.records,
                self._decoder(self.decode_size, None, most, self.max_words),
                self.tokenizer,
                name=self.records.name,
            )
        return self._pixels

    def _open(self):
        """Opens records and vocabulary, and checks the files."""
        if self.tokenizer is not None:
            self.tokenizer.load()
            self.records.check_captions()
        if self._skips is None:
            counter = bad_records.SkipCounter(
                self.max_skipped_fraction,
                self.num_examples,
                self.records.name,
            )
            self.records.check(counter)
            self._skips = counter

    def _batch_size(self, batch_size):
        arguments.check_integer("batch_size", batch_size or self.batch_size, 1)
        return batch_size or self.batch_size


def _split(batch, parts):
    """The batches [B / parts, ...] of a batch [B, ...], in order."""
    return tf.data.Dataset.from_tensor_slices(
        {
            key: tf.reshape(x, [parts, x.shape[0] // parts, *x.shape[1:]])
            for key, x in batch.items()
        }
    )


def _cut(labels, buckets, pad_id):
    """Cuts int32 [B, K, L] to the smallest bucket that holds all tokens."""
    longest = tf.reduce_max(
        tf.reduce_sum(tf.cast(labels != pad_id, tf.int32), axis=-1)
    )
    buckets = tf.constant(buckets)
    length = tf.reduce_min(tf.boolean_mask(buckets, buckets >= longest))
    return labels[..., :length]
