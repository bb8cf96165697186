"""Batches of the data set, as training and evaluation get them."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cappa_tf.data import caption_dataset, schema, text_lengths, tokenizer

SIZE = 8
COUNT = 21


def _image(value, side=SIZE):
    """A PNG whose pixels all tell which example it is."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, 255 - value, 7)).save(file, "PNG")
    return file.getvalue()


def _example(i):
    return schema.Example(
        key=f"k{i}",
        image=_image(10 * i),
        captions=[f"{i} {j}" for j in range(1 + i % 4)],
        label=i,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of 21 examples in 4 shards, and its tokenizer."""
    path = tmp_path_factory.mktemp("data")
    examples = [_example(i) for i in range(COUNT)]
    schema.write_dataset({"train": examples}, path, "d", 4)
    tokenizer.train_tokenizer(
        [c for e in examples for c in e.captions] * 3,
        path / "tokenizer.model",
        60,
    )
    return path


def make(data, **options):
    """A `CaptionDataset` over the folder."""
    options = {
        "split": "train",
        "tokenizer": tokenizer.Tokenizer(data / "tokenizer.model", 12),
        "image_size": SIZE,
        "batch_size": 7,
        **options,
    }
    return caption_dataset.CaptionDataset(data, **options)


def numbers(batch):
    """Which examples a batch holds, read off its pixels."""
    return np.round((batch["image"][:, 0, 0, 0] + 1) * 12.75).astype(int)


def take(dataset, count):
    """The first batches as dicts of arrays."""
    return list(dataset.take(count).as_numpy_iterator())


@pytest.mark.parametrize("cache", ["stream", "records", "images"])
def test_training_batches(data, cache):
    dataset = make(data, cache=cache, seed=1)
    batches = take(dataset.train(), 6)
    first = batches[0]
    assert set(first) == {"image", "labels", "index"}
    assert first["image"].shape == (7, SIZE, SIZE, 3)
    assert first["image"].dtype == np.float32
    assert first["labels"].shape == (7, 1, 12)
    assert first["labels"].dtype == np.int32
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, np.arange(2 * COUNT))
    for epoch in (batches[:3], batches[3:]):
        seen = np.concatenate([numbers(batch) for batch in epoch])
        assert sorted(seen) == list(range(COUNT))
    # Image and caption stay together.
    for batch in batches:
        texts = dataset.tokenizer.detokenize(batch["labels"][:, 0])
        said = [text.split(" ") for text in texts]
        assert [s[0] for s in said] == [f"{n}" for n in numbers(batch)]
        assert all(int(s[1]) <= n % 4 for s, n in zip(said, numbers(batch)))
    assert dataset.skipped == {}
    if cache != "images":
        return
    # The seed decides on order and captions, wherever it is given.
    again, other = (
        take(dataset.train(seed=1), 3),
        take(dataset.train(seed=2), 3),
    )
    np.testing.assert_array_equal(first["labels"], again[0]["labels"])
    assert not np.array_equal(numbers(first), numbers(other[0]))


@pytest.mark.parametrize("cache", ["stream", "images"])
def test_captions_are_read_without_images(data, cache):
    """Each record once, in a random order that the seed determines."""
    dataset = make(data, cache=cache, seed=1)
    found = list(dataset.read_captions(1000))
    written = [_example(i).captions for i in range(COUNT)]
    assert sorted(found) == sorted(written) and found != written
    assert list(dataset.read_captions(5)) == found[:5]
    assert list(make(data, cache=cache, seed=2).read_captions(5)) != found[:5]


@pytest.mark.parametrize("cache", [None, "records"])
def test_caches_change_nothing_but_speed(data, pixels, cache):
    """Small data sets are held in memory by default."""
    options, wanted = pixels
    found = take(make(data, cache=cache, **options).train(start_index=2), 4)
    for one, other in zip(found, wanted, strict=True):
        assert one["labels"].shape == (7, 3, 12)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def pixels(data):
    """Options of a stream, and its batches out of decoded images."""
    options = {
        "captions_per_image": 3,
        "flip": True,
        "crop_scale": (0.5, 1.0),
        "seed": 4,
    }
    dataset = make(data, cache="images", **options)
    return options, take(dataset.train(start_index=2), 4)


@pytest.mark.parametrize("cache", ["stream", "images"])
def test_any_start_and_number_of_hosts_continue_the_stream(data, cache):
    dataset = make(
        data, cache=cache, flip=True, shift=2, batch_size=3, num_readers=4
    )
    whole = take(dataset.train(), 12)

    def check(batches, positions):
        for i, position in enumerate(positions):
            expected, found = whole[position // 3], batches[i // 3]
            for name in ("index", "labels", "image"):
                np.testing.assert_allclose(
                    found[name][i % 3], expected[name][position % 3], atol=1e-5
                )

    check(take(dataset.train(start_index=25), 3), range(25, 34))
    # Hosts share each step, and go on from one host's.
    for host in (0, 1):
        share = dataset.train(start_index=6, host=host, num_hosts=2)
        check(take(share, 5), range(6 + host, 36, 2))


def test_several_captions_are_drawn_without_repetition(data):
    dataset = make(data, cache="images", captions_per_image=3)
    drawn = {}
    for batch in take(dataset.train(), 30):
        assert batch["labels"].shape == (7, 3, 12)
        texts = dataset.tokenizer.detokenize(batch["labels"].reshape(-1, 12))
        for i, n in enumerate(numbers(batch)):
            said = [t.split()[-1] for t in texts[3 * i : 3 * i + 3]]
            assert len(set(said)) == min(3, 1 + n % 4)
            drawn.setdefault(n % 4, set()).add(tuple(said))
    # Two captions to fill three places begin again: a, b, a.
    assert drawn[0] == {("0", "0", "0")}
    assert drawn[1] == {("0", "1", "0"), ("1", "0", "1")}
    assert len(drawn[2]) == 6
    assert len(drawn[3]) > 12


@pytest.mark.parametrize("cache", ["records", "images"])
def test_long_captions_are_drawn_only_where_there_are_no_others(
    tmp_path, cache
):
    captions = [
        ["a b c d e", "a b", " a  c ", "a b c"],  # Spaces are not words.
        ["a b c d", "d e d e", "a b c d e", " "],
        ["a b c d e"],
    ]
    examples = [
        schema.Example(key=f"k{i}", image=_image(10 * i), captions=some)
        for i, some in enumerate(captions)
    ]
    schema.write_dataset({"train": examples}, tmp_path, "d", 1)
    everything = [c.strip() for some in captions for c in some]
    tokenizer.train_tokenizer(everything * 9, tmp_path / "tokenizer.model", 20)
    dataset = make(
        tmp_path, cache=cache, captions_per_image=2, max_words=2, batch_size=3
    )
    drawn = [set(), set(), set()]
    for batch in take(dataset.train(), 20):
        texts = dataset.tokenizer.detokenize(batch["labels"].reshape(-1, 12))
        for i, n in enumerate(numbers(batch)):
            drawn[n].add(tuple(texts[2 * i : 2 * i + 2]))
    assert drawn[0] == {("a b", "a c"), ("a c", "a b")}
    assert drawn[1] == {("a b c d", "d e d e"), ("d e d e", "a b c d")}
    assert drawn[2] == {("a b c d e", "a b c d e")}
    assert dataset.skipped == {}
    # Evaluation uses the whole image.
    labels = take(dataset.evaluate(), 1)[0]["labels"]
    texts = dataset.tokenizer.detokenize(labels.reshape(-1, 12))
    assert texts[:2] == ["a b c d e", "a b"]


def test_all_captions(data):
    dataset = make(data, captions_per_image="all", cache="stream")
    assert dataset.num_captions == 4
    batch = take(dataset.evaluate(), 1)[0]
    texts = dataset.tokenizer.detokenize(batch["labels"][1])
    said = [t.split()[-1] for t in texts]
    count = 1 + numbers(batch)[1] % 4
    assert said == [str(j % count) for j in range(4)]


@pytest.fixture(scope="module")
def examples(data):
    """The records as Python reads them."""
    return list(make(data).read_examples())


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_evaluation_counts_every_example_once(data, examples, batch_size):
    dataset = make(data, batch_size=batch_size)
    assert len(examples) == dataset.num_examples == COUNT
    seen = 0
    for batch in take(dataset.evaluate(), -1):
        assert batch["image"].shape[0] == batch_size
        real = batch["_mask"] == 1
        for i, n in zip(batch["index"][real], numbers(batch)[real]):
            assert examples[i].key == f"k{n}"
        texts = dataset.tokenizer.detokenize(batch["labels"][:, 0])
        for i, text in zip(batch["index"][real], np.array(texts)[real]):
            assert text == examples[i].captions[0]
        # Padding has a caption, an empty one: a mean over its tokens exists.
        assert (batch["labels"][~real] != 0).sum() == (~real).sum()
        seen += real.sum()
    assert seen == COUNT
    assert dataset.skipped == {}


def test_lengths_are_chosen_from_the_counts_beside_the_vocabulary(
    data, monkeypatch
):
    dataset = make(data, length_buckets="auto", batch_size=3)
    monkeypatch.setattr(text_lengths, "read", lambda path: None)

    def shape(**options):
        return dataset.train(**options).element_spec["labels"].shape

    assert shape() == (3, 1, 12)
    monkeypatch.setattr(text_lengths, "read", lambda path: {4: 10})
    assert shape() == (3, 1, None)
    assert shape(fixed_length=True) == (3, 1, 12)
    assert dataset.evaluate().element_spec["labels"].shape == (3, 1, 12)
    (batch,) = take(dataset.train(), 1)
    assert batch["labels"].shape in [(3, 1, 8), (3, 1, 12)]


def test_length_buckets_hold_the_longest_caption(data):
    dataset = make(data, length_buckets=(2, 6), batch_size=3)
    plain = make(data, batch_size=3)
    for cut, whole in zip(
        take(dataset.evaluate(), -1), take(plain.evaluate(), -1)
    ):
        length = cut["labels"].shape[2]
        longest = (whole["labels"] != 0).sum(2).max()
        assert length == min(b for b in (2, 6, 12) if b >= longest)
        np.testing.assert_array_equal(
            cut["labels"], whole["labels"][..., :length]
        )


def test_without_tokenizer_labels_are_classes(data):
    (batch,) = take(make(data, tokenizer=None).evaluate(), 1)
    assert "labels" not in batch
    np.testing.assert_array_equal(batch["label"], numbers(batch))


def test_over_long_caption_is_cut_but_keeps_its_end(data):
    short = tokenizer.Tokenizer(data / "tokenizer.model", 3)
    batch = take(make(data, tokenizer=short).evaluate(), 1)[0]
    assert batch["labels"].shape == (7, 1, 3)
    np.testing.assert_array_equal(batch["labels"][..., -1], 1)


def test_the_constructor_opens_nothing(tmp_path):
    dataset = make(tmp_path / "none")
    with pytest.raises(ValueError, match=r"tokenizer.model"):
        dataset.train()
    with pytest.raises(ValueError, match=r"dataset.json"):
        make(tmp_path / "none", tokenizer=None).train()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": "8"}, "image_size='8'"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"captions_per_image": 0}, "captions_per_image=0"),
        ({"max_words": 0}, "max_words=0"),
        ({"cache": "disk"}, "cache='disk'"),
        ({"resize": "stretch"}, "resize='stretch'"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": 0.5}, "crop_scale=0.5"),
        ({"crop_scale": (0.5, 1), "shift": 1}, "exclude each other"),
        ({"shift": 8}, "shift=8"),
        ({"length_buckets": (4, 99)}, "max_length=12"),
        ({"length_buckets": "some"}, "length_buckets='some'"),
        ({"max_skipped_fraction": 2}, "max_skipped_fraction=2"),
        ({"split": None}, "split=None"),
        ({"tokenizer": "path"}, "tokenizer='path'"),
        ({"seed": 1e6}, "seed=1000000.0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(data, options, message):
    with pytest.raises(ValueError, match=message):
        make(data, **options)


def test_a_host_has_a_number(data):
    with pytest.raises(ValueError, match="host=2, num_hosts=2"):
        make(data).train(host=2, num_hosts=2)
    with pytest.raises(ValueError, match="num_hosts=0"):
        make(data).evaluate(host=0, num_hosts=0)


def test_missing_batch_size_and_split(data):
    with pytest.raises(ValueError, match="batch_size=None"):
        make(data, batch_size=None).train()
    with pytest.raises(ValueError, match=r"\['train'\].*split='val'"):
        make(data, split="val").train()


@pytest.mark.parametrize(
    "cache, instead", [("images", 'cache="records" or'), ("records", "stream")]
)
def test_too_much_for_memory_is_refused(data, monkeypatch, cache, instead):
    monkeypatch.setattr(caption_dataset.caching, "MEMORY_FRACTION", 1e-9)
    with pytest.raises(
        ValueError, match=rf'cache="{cache}" would take .* Use .*{instead}'
    ):
        make(data, cache=cache).train()


def test_fit_can_read_it(data):
    model = tf.keras.Sequential([tf.keras.layers.Flatten()])
    output = model.predict(
        make(data).evaluate().map(lambda batch: batch["image"]), verbose=0
    )
    assert output.shape == (COUNT, SIZE * SIZE * 3)


@pytest.mark.parametrize("resize", ["squash", "resize_small_central_crop"])
def test_reduced_decoding_covers_what_is_resized_to(tmp_path, resize):
    """Half of 48 x 96 pixels covers 24 x 24, but not a crop from 30 x 30."""
    y, x = np.mgrid[0:48, 0:96]
    pixels = np.stack([y * 5, x * 2, y + x], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    example = schema.Example("k", file.getvalue(), ["a"], 0)
    schema.write_dataset({"train": [example]}, tmp_path, "d", 1)

    def shown(read=False, **options):
        dataset = caption_dataset.CaptionDataset(
            tmp_path, "train", None, 24, batch_size=1, resize=resize, **options
        )
        if read:
            return take(dataset.evaluate(), 1)[0]["image"][0]
        return dataset.preprocessing.read_bytes(example.image)

    exact = shown(reduced_decode=False, antialias=True)
    for small in (24, 30):
        options = {"resize_small": small}
        full = shown(reduced_decode=False, **options)
        reduced = shown(**options)
        covered = resize == "squash" or small == 24
        # If half does not cover the target, the scale is not reduced.
        assert np.array_equal(full, reduced) != covered
    close = shown(resize_small=27)
    assert np.abs(close - exact).mean() < 0.1
    np.testing.assert_array_equal(shown(resize_small=27, read=True), close)
