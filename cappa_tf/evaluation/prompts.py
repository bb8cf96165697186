"""Prompts of zero-shot classification: templates and names of classes.

Reference: big_vision evaluators/proj/image_text/prompt_engineering.py and
prompt_engineering_constants.py. The sets of templates are those that OpenAI
published with CLIP (github.com/openai/CLIP, Prompt_Engineering_for_ImageNet),
plus the name alone.

Abbreviations for dimensions:
    C: classes.  M: templates.
"""

import string

DEFAULT_TEMPLATES = ("a photo of a {}",)

# The 80 templates of CLIP's ImageNet results and the name alone.
_CLIP_PAPER = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
    "{}",
)
# The seven that sufficed on ImageNet ("itap": I took a picture), and the name.
_CLIP_BEST = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "{}",
)
TEMPLATES = {"clip_paper": _CLIP_PAPER, "clip_best": _CLIP_BEST}

# Ways to use a name with commas, which separate the aliases of a class.
ALIASES = ("first", "all", "whole")


def canonical(text, keep=""):
    """Lower-cases a text and removes punctuation and needless spaces.

    canonical("T-shirt (cotton)")           -> "tshirt cotton"
    canonical("Great White_Shark,  big", keep=",") -> "great white shark, big"
    canonical("A photo of a {}.", keep="{}") -> "a photo of a {}"

    Args:
        text: A string.
        keep: Punctuation to keep where exactly this string occurs.

    Returns:
        A string. "_" becomes a space; other ASCII punctuation is deleted.
    """
    removed = str.maketrans("", "", string.punctuation)
    parts = text.replace("_", " ")
    parts = parts.split(keep) if keep else [parts]
    kept = keep.join(part.translate(removed) for part in parts)
    return " ".join(kept.lower().split())


def find_templates(templates):
    """Returns a set of templates given by name, or a list after validation.

    Args:
        templates: "clip_paper", "clip_best", or M texts, each with one {}
            where the name of the class goes.

    Returns:
        A tuple of M texts.

    Raises:
        ValueError: If the name is unknown, a text is not a template, or the
            list is empty.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise ValueError(
                f"`templates` must be one of {list(TEMPLATES)} or a list of "
                f"texts. Received: templates={templates!r}"
            )
        templates = TEMPLATES[templates]
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(
                "A template must contain {} once, in place of the name. "
                f"Received: {template!r} of {tuple(templates)}"
            )
    if not templates:
        raise ValueError(
            f"`templates` must not be empty. Received: templates={templates}"
        )
    return tuple(templates)


def class_prompts(class_names, templates, is_canonical=False, aliases="whole"):
    """Returns the texts of each class.

    class_prompts(["Cat, kitty"], ["A {}.", "The {}"], True, "first")
        -> [["a cat", "the cat"]]

    Args:
        class_names: C names; a comma separates aliases.
        templates: M texts, from `find_templates`.
        is_canonical: Whether to pass names and templates through `canonical`.
        aliases: "first" takes the first alias of a name, "all" every alias,
            and "whole" the name as it is.

    Returns:
        A list of C lists of texts, with the M texts of an alias together. With
        "all" an alias keeps the space before it, as in the reference.

    Raises:
        ValueError: If there is no class, or an alias is empty.
    """
    if is_canonical:
        templates = [canonical(text, keep="{}") for text in templates]
    texts = []
    for name in class_names:
        used = canonical(name, keep=",") if is_canonical else name
        parts = [used] if aliases == "whole" else used.split(",")
        parts = parts[:1] if aliases == "first" else parts
        if not all(part.strip() for part in parts):
            raise ValueError(
                "Class names and their aliases must not be empty. Received: "
                f"{name!r} among {class_names}"
            )
        texts.append([t.replace("{}", p) for p in parts for t in templates])
    if not texts:
        raise ValueError(
            f"`class_names` must not be empty. Received: {class_names}"
        )
    return texts
