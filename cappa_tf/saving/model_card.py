"""Model card: the README.md of a folder in which a model is passed on.

    facts = run_facts("runs/mine")
    card(model, facts, image, tokenizer)   # of a preset
    export_card(encoder, facts, "timm")    # of an export

It says what the model is, what it was trained on and for how long, the figures
of its run, and its limits. Its header is that of the Hugging Face Hub.
"""

import ast
import json
import os
import re

from cappa_tf.utils import files

UNKNOWN = "unknown"
_MACRO = re.compile(r"^(\w+) = (.+)$", re.MULTILINE)
# Class -> (what it is, the Hub's name of the task).
_KINDS = {
    "Captioner": ("image captioner", "image-to-text"),
    "SelfCriticalCaptioner": (
        "self-critical image captioner",
        "image-to-text",
    ),
    "ContrastiveCaptioner": (
        "image captioner with contrastive towers",
        "image-to-text",
    ),
    "Contrastive": (
        "contrastive model of images and texts",
        "zero-shot-image-classification",
    ),
    "Classifier": ("image classifier", "image-classification"),
}
_ENCODER = ("vision encoder", "image-feature-extraction")
_METHODS = {
    "Captioner": 'model.caption(["photo.jpg"])  # ["..."]',
    "SelfCriticalCaptioner": 'model.caption(["photo.jpg"])  # ["..."]',
    "ContrastiveCaptioner": 'model.caption(["photo.jpg"])  # ["..."]',
    "Contrastive": 'model.classify(["photo.jpg"], ["dog", "cat"])',
    "Classifier": 'model.classify(["photo.jpg"])',
}
_EMBED = 'model.embed(["photo.jpg"])  # [1, D]'
_OPEN = {
    "siglip": (
        "transformers",
        "from transformers import AutoModel\n\n"
        'model = AutoModel.from_pretrained("FOLDER")',
    ),
    "timm": (
        "timm",
        "import timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)',
    ),
}


def check_license(license):
    """Raises ValueError unless a licence is an identifier of the Hub's form."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            "`license` must be an identifier in small letters, such as "
            "apache-2.0, mit, cc-by-4.0 or other. "
            f"Received: license={license!r}"
        )


def run_facts(workdir):
    """What the files of a run tell about its training.

    Args:
        workdir: The run's folder. Files that are missing are left out.

    Returns:
        Dict of JSON values: "data" (name of the data set), "images" (number
        of its training images), "classes" (names), "steps", "batch_size" and
        "figures" (of results.json).
    """
    found, macros = {}, _macros(os.path.join(workdir, "config.gin"))
    data = macros.get("DATA")
    if isinstance(data, str):
        # Not the path, which is nobody's business.
        found["data"] = os.path.basename(data.rstrip("/"))
        description = _json(os.path.join(data, "dataset.json"))
        found["data"] = description.get("name", found["data"])
        train = description.get("splits", {}).get("train", {})
        found["images"] = train.get("num_examples")
        found["classes"] = description.get("metadata", {}).get("classes")
    elif isinstance(data, list):
        names = [os.path.basename(str(path).rstrip("/")) for path in data]
        found["data"] = ", ".join(names)
    results = _json(os.path.join(workdir, "results.json"))
    found["steps"] = results.pop("step", None)
    found["batch_size"] = macros.get("BATCH_SIZE")
    found["figures"] = {
        name: value
        for name, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {name: value for name, value in found.items() if value}


def _macros(path):
    """Macros of a gin file whose values are literals."""
    try:
        text = files.read_text(path)
    except OSError:
        return {}
    found = {}
    for name, value in _MACRO.findall(text):
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            continue  # A reference, or the first line of several.
    return found


def _json(path):
    try:
        found = json.loads(files.read_text(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def card(model, facts, image, tokenizer=None, dtype="float32"):
    """The text of a preset's README.md.

    Args:
        model: A built `Task` or vision encoder.
        facts: Dict of `run_facts`, and "license" if it is known.
        image: Dict of the image preprocessing.
        tokenizer: (Dict of its arguments, path of its vocabulary), or None.
        dtype: Of the stored weights.
    """
    kind = type(model).__name__
    what, task = _KINDS.get(kind, _ENCODER)
    use = (
        "import cappa_tf\n\n"
        'model = cappa_tf.from_preset("FOLDER")  # or hf://user/name\n'
        + _METHODS.get(kind, _EMBED)
    )
    height, width = image["image_size"]
    limits = [
        f"Images are resized to {height} x {width} pixels"
        + (
            ", without their aspect ratio."
            if image.get("resize", "squash") == "squash"
            else " and cropped in the middle."
        )
    ]
    if tokenizer is not None:
        arguments = tokenizer[0]
        limits.append(
            f"Texts have at most {arguments['max_length']} tokens, those of "
            "the model's own vocabulary"
            + (", in lower case." if arguments.get("lowercase") else ".")
        )
    if dtype == "float16":
        limits.append(
            "Weights are stored in float16, so they are rounded to 11 bits."
        )
    prompts = list(getattr(model, "prompts", ()))
    if prompts:
        limits.append(f"It was trained with the prompts {prompts}.")
    return _text("cappa_tf", what, task, model, facts, use, limits)


def export_card(model, facts, kind):
    """The text of README.md in an export to another library.

    Args:
        model: The exported model.
        facts: Dict of `run_facts`, or None.
        kind: "siglip" (transformers) or "timm".
    """
    library, use = _OPEN[kind]
    what, task = _KINDS.get(type(model).__name__, _ENCODER)
    encoder = getattr(model, "vision_encoder", model)
    height, width = encoder.image_size
    limits = [
        f"Images are resized to {height} x {width} pixels, without their "
        "aspect ratio; the image processors of other libraries interpolate "
        "otherwise than the training did, which changes features slightly."
    ]
    return _text(library, what, task, model, facts or {}, use, limits)


def _text(library, what, task, model, facts, use, limits):
    license = facts.get("license", UNKNOWN)
    name = facts.get("name") or f"{type(model).__name__}: {what}"
    header = [
        "---",
        f"license: {license}",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags: [cappa, image-captioning, vision]",
        "---",
    ]
    sections = [
        f"# {name}",
        f"A {what} of {model.count_params():,} parameters, trained and "
        "written by cappa_tf, a TensorFlow implementation of CapPa "
        "([arXiv 2306.07915](https://arxiv.org/abs/2306.07915)).".replace(
            "A image", "An image"
        ),
        f"## Use\n\n```python\n{use}\n```",
        "## Training\n\n" + _training(facts),
        "## Figures\n\n" + _figures(facts.get("figures", {})),
        "## Limits\n\n" + "\n".join(f"- {x}" for x in limits + _LIMITS),
        "## Licence\n\n" + _license(license),
    ]
    return "\n".join([*header, "\n\n".join(sections)]) + "\n"


_LIMITS = [
    "It reproduces what is wrong or one-sided in its training data, and can "
    "be wrong on images unlike them; look at its output before you rely on it.",
    "It was not evaluated for any use that affects people.",
]


def _training(facts):
    lines = []
    if "data" in facts:
        count = f", {facts['images']:,} images" if "images" in facts else ""
        lines.append(f"- Data: {facts['data']}{count}")
    steps, size = facts.get("steps"), facts.get("batch_size")
    if steps and size:
        lines.append(
            f"- Steps: {steps:,} of {size:,} images ({steps * size:,} seen)"
        )
    elif steps:
        lines.append(f"- Steps: {steps:,}")
    if "command" in facts:
        lines.append(f"- Made by: `{facts['command']}`")
    return "\n".join(lines) or "Not known: the run's files were not there."


def _figures(figures):
    if not figures:
        return "None were computed at the end of its run."
    rows = [f"| {name} | {value:.4g} |" for name, value in figures.items()]
    lead = "Of the final evaluation of its run, on its own test data:"
    return "\n".join([lead, "", "| metric | value |", "|---|---|", *rows])


def _license(license):
    if license == UNKNOWN:
        return "The author has not stated one."
    return f"`{license}`, as stated by the author."
