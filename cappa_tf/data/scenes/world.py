"""Scenes: a small synthetic data set with one true caption per image.

Contents: three of four images show two objects on a gray background; each has
one of 2 sizes, 8 colors and 6 shapes, and they are in one of 2 relations. The
others show one of 12 words, printed in one color on another:

    a small red circle left of a large blue square
    a large white star above a small black ring
    the word lamp in green on white

Captions: the left or the upper object comes first. The axis is unambiguous:
along it the objects do not overlap, and across it their centers differ by at
most 0.4 of the distance along it. A large object is at least 1.6 times as wide
as a small one, and a caption tells only size, color, shape and relation. (If
both "a above b" and "b below a" were used, a captioner could only guess which
was chosen: 7% exact match instead of 78%.)

Counts: objects have (8 * 6) * 2 * (8 * 6) = 4,608 compositions (color, shape,
relation, color, shape), each in 4 pairs of sizes. Words have 12 * 28 pairs of
colors that differ enough in brightness = 336 compositions. A tenth of them (438
and 28) is held out, as decided by a hash of the composition (`is_held_out`), so
these are the same for every seed and number of images. The split "train" never
shows one, "heldout" shows nothing else, and "validation" shows new images of
compositions that may occur in "train".
"""

import dataclasses
import functools
import hashlib
import io
import os

import numpy as np
import tqdm

from cappa_tf.data import schema, tokenizer
from cappa_tf.data.scenes import render
from cappa_tf.data.scenes.render import COLORS, RELATIONS, SHAPES, SIZES
from cappa_tf.utils import files

# Stored in the description of each data set, including existing ones.
_SOURCE = "cappa_tf.data.scenes"

# fmt: off
WORDS = (
    "ant", "boat", "cake", "dog", "fish", "hat", "king", "lamp", "moon",
    "ship", "tree", "van",
)
# fmt: on
# Words in colors of nearly equal brightness cannot be read.
MIN_CONTRAST = 80  # of 255
WORD_SHARE = 0.25

NAME = "scenes"
SPLITS = ("train", "validation", "heldout")
VOCABULARY = "tokenizer.model"
# 3 special pieces, 36 words, 23 letters (one is a word, too) and the space, the
# same for any seed.
VOCABULARY_SIZE = 63

# Raised whenever the same arguments would yield other images than before.
_VERSION = 5
_VOCABULARY_CAPTIONS = 5_000


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene, described in the words of its caption."""

    size: str
    color: str
    shape: str

    def __str__(self):
        return f"{self.size} {self.color} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Two objects; `first` is the left or the upper one."""

    first: Thing
    relation: str
    second: Thing

    @property
    def caption(self):
        """The one true caption."""
        return f"a {self.first} {self.relation} a {self.second}"

    @property
    def composition(self):
        """The composition, which may be held out; excludes sizes."""
        a, b = self.first, self.second
        return (a.color, a.shape, self.relation, b.color, b.shape)


@dataclasses.dataclass(frozen=True)
class Print:
    """One word, printed in one color on a background of another."""

    word: str
    color: str
    ground: str

    @property
    def caption(self):
        """The one true caption."""
        return f"the word {self.word} in {self.color} on {self.ground}"

    @property
    def composition(self):
        """The composition, which may be held out."""
        return (self.word, self.color, self.ground)


def is_held_out(composition):
    """Returns whether a composition is held out: one in ten, by its hash."""
    digest = hashlib.sha256(" ".join(composition).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 10 == 0


@functools.cache
def print_colors():
    """Pairs (color, ground) that differ by `MIN_CONTRAST` in brightness."""
    return tuple(
        (color, ground)
        for color in COLORS
        for ground in COLORS
        if abs(render.brightness(color) - render.brightness(ground))
        >= MIN_CONTRAST
    )


def sample(rng, held_out):
    """Samples the content of an image.

    Args:
        rng: A `numpy.random.Generator`.
        held_out: Whether to sample a held-out composition, or another one.

    Returns:
        A `Scene` or a `Print`.
    """
    kind = _sample_print if rng.random() < WORD_SHARE else _sample_scene
    while True:  # 1.1 rounds on average, 10 if held out
        content = kind(rng)
        if is_held_out(content.composition) == held_out:
            return content


def _sample_scene(rng):
    def thing():
        return Thing(
            _choose(rng, tuple(SIZES)),
            _choose(rng, tuple(COLORS)),
            _choose(rng, SHAPES),
        )

    return Scene(thing(), _choose(rng, tuple(RELATIONS)), thing())


def _sample_print(rng):
    return Print(_choose(rng, WORDS), *_choose(rng, print_colors()))


def _choose(rng, options):
    return options[int(rng.integers(len(options)))]


def draw(content, rng, image_size=64):
    """Renders a `Scene` or a `Print` as an RGB image.

    Args:
        content: Content of the image.
        rng: A `numpy.random.Generator` for positions, shades and noise.
        image_size: Height and width in pixels.
    """
    if isinstance(content, Scene):
        return render.draw_objects(content, rng, image_size)
    words = (content.word, content.color, content.ground)
    return render.draw_word(*words, rng, image_size)


def examples(split, num_examples, image_size=64, seed=0):
    """Renders a split; each image depends on (seed, split, index) only.

    Args:
        split: "train", "validation" or "heldout".
        num_examples: Number of images.
        image_size: Height and width in pixels.
        seed: An int; other seeds yield other images of the same kind.

    Yields:
        `schema.Example`s with JPEG bytes of high quality and one caption.
    """
    for index in range(num_examples):
        content, rng = _content(split, index, seed)
        buffer = io.BytesIO()
        image = draw(content, rng, image_size)
        image.save(buffer, "JPEG", quality=95, subsampling=0)
        yield schema.Example(
            key=f"{split}-{index:06d}",
            image=buffer.getvalue(),
            captions=[content.caption],
        )


def write_pictures(folder, count, image_size=64):
    """Writes held-out images as files that are named by their captions.

    Args:
        folder: Existing folder.
        count: Number of images.
        image_size: Height and width in pixels, at least 32.

    Returns:
        Paths of the files.
    """
    paths = []
    for example in examples("heldout", count, image_size):
        name = example.captions[0].replace(" ", "_")
        paths.append(os.path.join(folder, f"{name}.jpg"))
        files.write_bytes(paths[-1], example.image)
    return paths


def captions(split, num_examples, seed=0):
    """Yields the captions of `examples`, without rendering images."""
    for index in range(num_examples):
        yield _content(split, index, seed)[0].caption


def _content(split, index, seed):
    """The content of an image, and the generator to render it with."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return sample(rng, held_out=split == "heldout"), rng


def prepare(
    output_dir,
    num_train=20_000,
    num_eval=1_000,
    image_size=64,
    seed=0,
    vocabulary_size=VOCABULARY_SIZE,
    num_shards=8,
):
    """Writes the data set (also named `write_scenes`), unless it exists.

    Takes a second per 800 images on one CPU core. The same arguments yield the
    same files, byte for byte, with the same versions of Pillow and
    SentencePiece.

    Args:
        output_dir: Folder for shards, dataset.json and tokenizer.model.
        num_train: Number of images of the split "train".
        num_eval: Number of images of each of "validation" and "heldout".
        image_size: Height and width of the images in pixels, at least 32.
        seed: Seed of all images and captions.
        vocabulary_size: Number of pieces of the vocabulary, which is trained
            on captions of "train". More than 63 are not possible.
        num_shards: Number of shards of "train"; the other splits have one.

    Returns:
        The `DatasetDescription`.

    Raises:
        ValueError: If an argument is invalid, or the folder holds something
            else; scenes of other arguments are not overwritten.
    """
    arguments = {
        "num_train": num_train,
        "num_eval": num_eval,
        "image_size": image_size,
        "seed": seed,
        "vocabulary_size": vocabulary_size,
        "num_shards": num_shards,
    }
    _check_arguments(arguments)
    arguments["version"] = _VERSION
    found = _find(output_dir, arguments)
    if found is not None:
        return found
    _train_vocabulary(output_dir, arguments)
    counts = dict(zip(SPLITS, (num_train, num_eval, num_eval)))
    # The description is written last, so it marks a complete data set.
    return schema.write_dataset(
        {
            split: tqdm.tqdm(
                examples(split, count, image_size, seed),
                desc=f"rendering {split}",
                total=count,
                unit="image",
                leave=False,
            )
            for split, count in counts.items()
        },
        output_dir,
        name=NAME,
        num_shards={"train": num_shards, "validation": 1, "heldout": 1},
        metadata={"source": _SOURCE, "arguments": arguments},
    )


write_scenes = prepare


def _check_arguments(arguments):
    least = {"image_size": 32, "seed": 0, "vocabulary_size": 32}
    for name, value in arguments.items():
        lowest = least.get(name, 1)
        # bool is an int, too.
        if type(value) is not int or value < lowest:
            raise ValueError(
                f"`{name}` must be an integer of at least {lowest}. "
                f"Received: {name}={value!r}"
            )


def _find(output_dir, arguments):
    """The description of complete scenes with these arguments, or None."""
    output_dir = os.fspath(output_dir)
    if not os.path.exists(os.path.join(output_dir, "dataset.json")):
        return None
    found = schema.DatasetDescription.load(output_dir)
    present = found.metadata.get("arguments")
    if found.metadata.get("source") != _SOURCE or present != arguments:
        raise ValueError(
            f"{output_dir} holds another data set: {found.name!r} with "
            f"{present}. Remove it or choose another folder. "
            f"Received: {arguments}"
        )
    found.verify()
    path = os.path.join(output_dir, VOCABULARY)
    if not os.path.exists(path):
        _train_vocabulary(output_dir, arguments)
    return found


def _train_vocabulary(output_dir, arguments):
    """Trains the vocabulary on the first captions of "train".

    SentencePiece chooses candidate pieces before it splits lines into words,
    and never a word that is always followed by a space. Therefore each word is
    also added on a line of its own, which reduces captions from 17 tokens to
    10.
    """
    lines = list(captions("train", _VOCABULARY_CAPTIONS, arguments["seed"]))
    lines += [word for line in lines for word in line.split()]
    path = os.path.join(os.fspath(output_dir), VOCABULARY)
    wanted = arguments["vocabulary_size"]
    found = tokenizer.train_tokenizer(lines, path, wanted)
    if found != wanted:
        raise ValueError(
            f"The captions of scenes yield at most {found} pieces. "
            f"Received: vocabulary_size={wanted}"
        )
