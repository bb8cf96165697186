"""New names of what gin files of older versions name.

A run's config.gin outlives the version that wrote it, so files are updated as
they are read. This module knows text only; `cappa_tf.config` reads with it.
"""

import re

# New locations of modules that files of version 0.1.0, including a run's
# config.gin, import from their old ones, by their names in bindings.
_MOVED = {
    "cappa_tf.data": {
        "img2dataset": "sources.tfrecords",
        "label_captions": "sources.class_captions",
        "mixture": "sources.mixture",
        "pipeline": "caption_dataset",
        "records": "sources.prepared",
        "scenes": "scenes.world",
        "tfds": "sources.tfds_source",
        "webdataset": "sources.webdataset",
    },
    "cappa_tf.evaluation": {
        "compositional": "compositional.benchmarks",
        "judgments": "human_judgments",
    },
    "cappa_tf.training": {
        "adafactor": "optimizers.adafactor",
        "optimizers": "optimizers.adamw",
        "schedules": "optimizers.schedules",
        "trainer": "train",
    },
}

# Files of version 0.1.0 that combined a size and a captioner.
_SIZED = re.compile(
    r"gin/models/(ti16|s16|m16|b16|l16|l14|so400m14|mini8|small16|tiny8)\.gin"
)
_CAPTIONER = "gin/models/captioner.gin"

SETTINGS = "cappa_tf.training.settings"
# Arguments of the root function in version 0.1.0 that are now fields of a
# settings object: (its class, the root's argument for it) -> the fields.
MOVED_ARGUMENTS = {
    ("RunSettings", "settings"): (
        "total_steps batch_size accumulation_steps steps_per_loop log_steps "
        "checkpoint_steps keep_checkpoints seed"
    ),
    ("EvaluationSettings", "evaluation"): (
        "eval_steps evaluator_steps eval_batch_size sample_images "
        "final_evaluation final_weights caption_metrics sheet_images"
    ),
    ("ComputeSettings", "compute"): (
        "strategy devices precision jit_compile deterministic"
    ),
}


def files_for(path):
    """The gin files that take the place of one, which may be itself."""
    sized = _SIZED.fullmatch(str(path))
    return [_CAPTIONER, f"gin/sizes/{sized[1]}.gin"] if sized else [path]


def updated(text):
    """The text of a gin file, with the new names of modules and files."""
    text = re.sub(
        rf"^include '{_SIZED.pattern}'",
        rf"include '{_CAPTIONER}'\ninclude 'gin/sizes/\1.gin'",
        text,
        flags=re.M,
    )
    # A file without imports has the names from the files that it includes.
    names = {} if "dynamic_registration" in text else _new_names()

    def imported(found):
        package, name, alias = found.groups()
        if name not in _MOVED.get(package, ()):
            return found[0]
        package, _, new = f"{package}.{_MOVED[package][name]}".rpartition(".")
        if not alias:
            names[name] = new
        return f"from {package} import {new}{alias or ''}"

    text = re.sub(
        r"^from (cappa_tf\.\w+) import (\w+)( as \w+)?(?=\s*(?:#|$))",
        imported,
        text,
        flags=re.M,
    )
    return renamed(text, names)


def _new_names():
    """Dict from the old to the new name of each moved module."""
    return {
        old: new.rpartition(".")[2]
        for moved in _MOVED.values()
        for old, new in moved.items()
    }


def renamed(text, names=None):
    """Renames modules in bindings and references.

    Args:
        text: Bindings.
        names: Dict from old to new names; by default those of all modules
            that have moved.
    """
    names = _new_names() if names is None else names
    # "scope/module.Class.argument = @scope/module.Class()"
    return re.sub(
        r"(^|@)((?:\w+/)*)(\w+)(?=\.)",
        lambda m: m[1] + m[2] + names.get(m[3], m[3]),
        text,
        flags=re.M,
    )
