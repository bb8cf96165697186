"""Requests of the demo page: an image, and what to do with it.

The body of a request is a line of JSON, the options, followed by the bytes of
the image file.
"""

import dataclasses
import json

from cappa_tf.evaluation import prompts
from cappa_tf.inference import samplers
from cappa_tf.utils.arguments import check_choice

_MOST_LABELS = 200
_MOST_LETTERS = 1000  # of a label, a prompt, a template or a name
# Options of samplers, with their types and largest values.
_NUMBERS = {
    "temperature": (float, 10.0),
    "top_k": (int, 100_000),
    "top_p": (float, 1.0),
    "beams": (int, 16),
    "length_penalty": (float, 10.0),
}
_MOST_CAPTIONS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """What a request asks for; all values come from a page.

    Attributes:
        name: Name of the image's file.
        prompt: What the caption or the labels answer, "" for nothing.
        sampler: One of `samplers.OPTIONS`.
        sampling: Options of the sampler, pairs of name and number.
        num_captions: Number of captions.
        seed: Seed of samples.
        labels: Labels to rank; empty for the classes of a classifier.
        template: Text with {} in place of a label.
        preview: Whether the answer has a JPEG of the image, for kinds of
            images that browsers do not show.
    """

    name: str = ""
    prompt: str = ""
    sampler: str = "greedy"
    sampling: tuple = ()
    num_captions: int = 1
    seed: int = 0
    labels: tuple = ()
    template: str = "{}"
    preview: bool = False

    @property
    def generation(self):
        """Options of `Captioner.generate`, those that have other defaults."""
        options = {}
        if self.sampler != "greedy":
            options["sampler"] = samplers.make_sampler(
                self.sampler, **dict(self.sampling)
            )
        if self.num_captions != 1:
            options["num_captions"] = self.num_captions
        return options


def parse(body):
    """Splits the body of a request.

    Args:
        body: Bytes.

    Returns:
        (`Options`, the bytes of the image).

    Raises:
        ValueError: If an option is unknown or wrong; names it.
    """
    line, found, image = body.partition(b"\n")
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        given = None
    if not found or not isinstance(given, dict):
        raise ValueError(
            "A request must be a line of JSON, an object, and an image. "
            f"Received: {body[:40]!r}"
        )
    return _options(given), image


def _options(given):
    known = {field.name: field.default for field in dataclasses.fields(Options)}
    known["sampling"] = {}
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"Options must be among {sorted(known)}. Received: {unknown}"
        )
    values = {**known, **given}
    for name in ("name", "prompt", "template"):
        values[name] = _text(name, values[name])
    check_choice(samplers.OPTIONS, sampler=values["sampler"])
    check_choice((True, False), preview=values["preview"])
    values["num_captions"] = _number(
        "num_captions", values["num_captions"], int, _MOST_CAPTIONS
    )
    values["seed"] = _number("seed", values["seed"], int, 2**53)
    sampling = values["sampling"]
    if not isinstance(sampling, dict) or not sampling.keys() <= _NUMBERS.keys():
        raise ValueError(
            f"`sampling` must be an object of some of {sorted(_NUMBERS)}. "
            f"Received: {sampling!r}"
        )
    values["sampling"] = tuple(
        (name, _number(name, x, *_NUMBERS[name]))
        for name, x in sorted(sampling.items())
    )
    labels = values["labels"]
    if not isinstance(labels, list | tuple) or len(labels) > _MOST_LABELS:
        raise ValueError(
            f"`labels` must be a list of at most {_MOST_LABELS} texts. "
            f"Received: {str(labels)[:100]}"
        )
    labels = [_text("labels", label) for label in labels]
    values["labels"] = tuple(dict.fromkeys(filter(None, labels)))
    prompts.find_templates([values["template"]])
    return Options(**values)


def _text(name, value):
    if not isinstance(value, str) or len(value) > _MOST_LETTERS:
        raise ValueError(
            f"`{name}` must be text of at most {_MOST_LETTERS} letters. "
            f"Received: {str(value)[:100]!r}"
        )
    # Half of a surrogate pair cannot be encoded.
    return value.encode(errors="replace").decode().strip()


def _number(name, value, kind, most):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and kind is int:
        is_number = isinstance(value, int)
    if not is_number or not 0 <= value <= most:
        raise ValueError(
            f"`{name}` must be {'an integer' if kind is int else 'a number'} "
            f"from 0 to {most}. Received: {name}={value!r}"
        )
    return kind(value)
