"""Choices between right and wrong captions, from SugarCrepe and ARO files.

SugarCrepe (github.com/RAIVNLab/sugar-crepe): seven files such as
swap_att.json, {"0": {"filename", "caption", "negative_caption"}, ...}.

ARO (github.com/mertyg/vision-language-models-are-bows): a list of
    {"image_path", "true_caption", "false_caption"}      VG-Relation and
        VG-Attribution, with "relation_name" or "attributes", and "bbox_x",
        "bbox_y", "bbox_w", "bbox_h", the part of the image described
    {"image_path", "caption_options"}   COCO-Order and Flickr30k-Order; the
        first option is the right one
"""

import dataclasses
import json
import os

SUGAR_CREPE = (
    "replace_obj",
    "replace_att",
    "replace_rel",
    "swap_obj",
    "swap_att",
    "add_obj",
    "add_att",
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One image with a right caption and wrong ones.

    Attributes:
        subset: Kind of difference between the captions, such as "swap_att".
        texts: The right caption, then at least one wrong one.
        image: Path of the image, relative to the folder of images; None if the
            image comes with the choice.
        box: (left, top, width, height) in pixels of the part described, or
            None for the whole image.
    """

    subset: str
    texts: tuple
    image: str | None = None
    box: tuple | None = None


def read_sugar_crepe(folder):
    """Reads the files of SugarCrepe that are in a folder.

    Returns:
        A list of `Choice`s, subset by subset.

    Raises:
        ValueError: If there is none of them, or one is malformed.
    """
    paths = {
        subset: os.path.join(folder, f"{subset}.json") for subset in SUGAR_CREPE
    }
    found = {s: p for s, p in paths.items() if os.path.exists(p)}
    if not found:
        raise ValueError(
            "SugarCrepe must be a folder with "
            f"{', '.join(SUGAR_CREPE)} (.json). Received: {folder}"
        )
    choices = []
    for subset, path in found.items():
        for number, item in _load(path, dict).items():
            where = f"{path}, item {number}"
            texts = _texts(item, where, "caption", "negative_caption")
            image = _texts(item, where, "filename")[0]
            choices.append(Choice(subset, texts, image))
    return choices


def read_aro(path):
    """Reads one file of ARO, in any of the forms above.

    Returns:
        A list of `Choice`s, whose subsets are the relations ("to the left
        of"), the pairs of attributes ("black, white") or the file's name.

    Raises:
        ValueError: If the file is malformed.
    """
    name = os.path.splitext(os.path.basename(path))[0]
    choices = []
    for number, item in enumerate(_load(path, list)):
        where = f"{path}, item {number}"
        image = _texts(item, where, "image_path")[0]
        if "caption_options" in item:
            texts, box = tuple(item["caption_options"]), None
            if len(texts) < 2 or not all(isinstance(t, str) for t in texts):
                raise ValueError(
                    "`caption_options` must be at least two texts. Received: "
                    f"{texts} in {where}"
                )
        else:
            texts = _texts(item, where, "true_caption", "false_caption")
            box = _box(item)
        subset = item.get("relation_name") or item.get("attributes") or name
        if not isinstance(subset, str):
            subset = ", ".join(subset)
        choices.append(Choice(subset, texts, image, box))
    return choices


def _load(path, kind):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, kind) or not content:
        raise ValueError(
            f"{path} must hold a JSON {kind.__name__} of items. Received: "
            f"{type(content).__name__} of {len(content)}"
        )
    return content


def _texts(item, where, *names):
    texts = tuple(item.get(name) for name in names)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(
            f"An item must have the texts {names}. Received: {item} in {where}"
        )
    return texts


def _box(item):
    names = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
    if not any(name in item for name in names):
        return None
    return tuple(int(item[name]) for name in names)
