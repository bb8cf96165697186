"""Initial weights of a run, read from another run or from a model file.

Parts (`Task.parts`) are matched by name, their arrays by path. Learned image
positions are resampled if the resolution differs. Any other difference is an
error that lists both sides.
"""

import os
import re

import numpy as np

from cappa_tf.models.positions import resample_positions
from cappa_tf.models.task import Task
from cappa_tf.saving import (
    big_vision,
    clip_jax,
    preset_folder,
    run_folder,
    siglip,
)
from cappa_tf.saving.checkpoints import (
    latest_checkpoint,
    named_variables,
    read_arrays,
    saved_state,
)
from cappa_tf.saving.weights import to_numpy, variables_by_path
from cappa_tf.utils import files

_POSITIONS = "positions/position_embedding"
# Arguments of towers that must be those of the source.
_SIZES = (
    "hidden_dim num_layers num_heads mlp_dim patch_size pooling style "
    "num_registers keep_registers"
).split()
# Maximum number of differences that an error message lists.
_MOST_LINES = 12


def first_weights(model, weights, workdir):
    """Initializes the model of a run that has no checkpoint yet.

    Args:
        model: Built `Task`.
        weights: The run's `WeightSettings`.
        workdir: The run's folder. If it holds a checkpoint, nothing is read,
            as the run resumes from that.

    Returns:
        A log line that says what was read, or None.

    Raises:
        ValueError: If `initialize` cannot read the weights.
    """
    if weights.initialize_from is None or latest_checkpoint(workdir):
        return None
    return initialize(model, weights.initialize_from, weights.initialize_parts)


def check_vocabulary(model, weights, data):
    """Refuses texts tokenized otherwise than those the weights were trained on.

    Vocabularies of one size have the same shapes but give the ids to other
    pieces, so that nothing else would notice.

    Args:
        model: Built `Task`.
        weights: The run's `WeightSettings`.
        data: The training data set.

    Raises:
        ValueError: If parts that read texts come from a run with another
            vocabulary.
    """
    path = weights.initialize_from
    if path is None or data.tokenizer is None:
        return
    read = weights.initialize_parts
    texts = [
        name
        for name, part in model.parts.items()
        if hasattr(part, "vocabulary_size") and (read is None or name in read)
    ]
    path = preset_folder.locate(path)
    folder = path if files.isdir(path) else os.path.dirname(path)
    kept = run_folder.find_vocabulary(folder)
    if not texts or not files.exists(kept):
        return
    if files.read_bytes(kept) != files.read_bytes(data.tokenizer.path):
        raise ValueError(
            f"`initialize_from` gives {', '.join(texts)}, so the vocabulary "
            "must be the one it was trained with: set TOKENIZER "
            "(Tokenizer.path) to that file, or leave those parts out of "
            f"INITIALIZE_PARTS. Received: {data.tokenizer.path}, which differs "
            f"from {kept}"
        )


def initialize(model, path, parts=None):
    """Copies the weights of another model into a built one.

    Args:
        model: Built `Task`.
        path: Folder of a run (its final, else its best, else its newest
            weights), preset, `.keras` file of a model or of a vision encoder,
            npz file of big_vision, or folder of transformers' SigLIP or of
            clip-jax.
        parts: Names of the parts to read; None for the whole model.

    Returns:
        A log line that says what was read.

    Raises:
        ValueError: If `path` cannot be read or lacks a part, or if arrays do
            not fit; the message lists what each side has.
    """
    wanted = list(model.parts) if parts is None else list(parts)
    _check_parts(
        "`initialize_parts` must be among the parts of the model",
        wanted,
        model.parts,
    )
    return _copy(_open(path, model, wanted), model, wanted, path)


def continue_run(model, optimizer, folder):
    """Makes a new run the continuation of another one.

    It takes over the weights of the newest checkpoint, the optimizer's state
    and the number of steps. Positions are resampled, and so is the optimizer's
    state of them; where that has another form (factored second moments), each
    of its elements starts as their mean.

    Args:
        model: Built `Task`.
        optimizer: Built optimizer, of the kind of the other run's.
        folder: Folder of the other run.

    Returns:
        (log line, number of training examples that the other run has seen).

    Raises:
        ValueError: If there is no checkpoint, or it does not fit; the message
            lists what each side has.
    """
    path = latest_checkpoint(folder)
    if path is None:
        raise ValueError(
            "`continue_from` must be the folder of a run with a checkpoint. "
            f"Received: continue_from={folder!r}"
        )
    parts = _parts_of(run_folder.load_model(folder, weights="latest"))
    line = _copy(parts, model, list(model.parts), folder)
    weights = named_variables(model)
    slots = {
        name: variable
        for name, variable in named_variables(model, optimizer).items()
        if name not in weights
    }
    saved = dict(saved_state(path)["inventory"])
    # Those of the positions may be of another form.
    types = {
        **{name: "float32" for name in saved if _SECOND_MOMENT.search(name)},
        **{name: variable.dtype for name, variable in slots.items()},
    }
    arrays = read_arrays(path, types)
    grids = [
        getattr(side.get("vision_encoder"), "grid", None)
        for side in (parts, model.parts)
    ]
    for name, variable in slots.items():
        value = _slot(name, tuple(variable.shape), arrays, *grids)
        if value is None:
            raise ValueError(
                "The optimizer must be of the kind of the run that "
                f"`continue_from` names. Received: {folder}, which has no "
                f"{name} of shape {tuple(variable.shape)}"
            )
        variable.assign(value)
    state = saved_state(path)
    line = line.replace("initialized from", "continues", 1)
    return f"{line}, at step {state['step']}", state.get("examples", 0)


_SECOND_MOMENT = re.compile(r"positions[_/]position_embedding_velocity")


def _slot(name, shape, arrays, old_grid, grid):
    """A variable of the optimizer, as the other run leaves it; or None."""
    value = arrays.get(name)
    if value is not None and value.shape == shape:
        return value
    if "positions_position_embedding" not in name.replace("/", "_"):
        return None
    cells = [x and x[0] * x[1] for x in (old_grid, grid)]
    if value is not None and [value.shape[1:2], shape[1:2]] == [
        (count,) for count in cells
    ]:
        table = np.reshape(value, (1, cells[0], -1))
        return resample_positions(table, grid, old_grid).reshape(shape)
    if not _SECOND_MOMENT.search(name):
        return None
    of_table = name.partition("_velocity")[0] + "_velocity"
    moments = [x for key, x in arrays.items() if key.startswith(of_table)]
    # Each of them, factored or not, has the mean of the squared gradients.
    return np.full(shape, np.mean(moments[0]), np.float32) if moments else None


def _copy(source, model, wanted, path):
    """Copies the parts `wanted` of `source`, a dict, which is at `path`."""
    _check_parts(
        f"`initialize_from` must have the parts to read. {path} has the parts",
        wanted,
        source,
    )
    problems, pairs, notes = [], [], []
    for name in wanted:
        found = _arrays(source[name], model.parts[name], notes)
        variables = variables_by_path(model.parts[name])
        new = _without_source(model, name, found, variables)
        if new:
            notes.append(f"{', '.join(new)} not in it, so from scratch")
            variables = {
                path: variable
                for path, variable in variables.items()
                if path.split("/")[0] not in new
            }
        problems += [
            f"  {name}.{line}"
            for line in _other_sizes(source[name], model.parts[name], new)
        ]
        problems += [
            f"  {name}/{line}" for line in _differences(found, variables)
        ]
        pairs += [(v, found.get(key)) for key, v in variables.items()]
    if problems:
        more = len(problems) - _MOST_LINES
        problems[_MOST_LINES:] = [f"  ... and {more} more"] * (more > 0)
        raise ValueError(
            f"`initialize_from` must fit the model. Received: {path}, which "
            "differs in:\n" + "\n".join(problems)
        )
    for variable, value in pairs:
        variable.assign(value)
    count = sum(value.size for _, value in pairs)
    about = "; ".join([", ".join(wanted), f"{count:,} parameters", *notes])
    return f"initialized from {path}: {about}"


def _check_parts(rule, wanted, parts):
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise ValueError(
            f"{rule} {list(parts)}; list those to read in `initialize_parts` "
            f"(INITIALIZE_PARTS). Received: {missing}"
        )


def _open(path, model, wanted):
    """The parts of the model at `path`, as a dict of layers by name."""
    try:
        path = preset_folder.locate(path)
        if path.endswith(".npz"):
            found = _open_npz(path, model, wanted)
        elif clip_jax.is_clip_jax(path):
            part = model.parts.get("vision_encoder")
            size = getattr(part, "image_size", None)
            found = clip_jax.load_captioner(path, image_size=size)
        elif siglip.is_siglip(path):
            found = _open_siglip(path, wanted)
        else:
            found = run_folder.load_model(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`initialize_from` (INITIALIZE_FROM) cannot be read: {error}"
        ) from error
    return _parts_of(found)


def _parts_of(model):
    return model.parts if isinstance(model, Task) else {"vision_encoder": model}


def _open_npz(path, model, wanted):
    """A model of big_vision; sizes its arrays do not tell are `model`'s."""
    arrays = big_vision.read_arrays(path)
    size = getattr(model.parts.get("vision_encoder"), "image_size", None)
    if wanted != ["vision_encoder"] and big_vision.is_two_towers(arrays):
        return big_vision.load_two_towers(arrays, size)
    if wanted == ["vision_encoder"] or not big_vision.is_captioner(arrays):
        return big_vision.load_vision_encoder(arrays, size)
    decoder = model.parts.get("text_decoder")
    # Learned text positions tell the maximum length.
    fixed = getattr(decoder, "position_embedding", None) == "sincos2d"
    length = decoder.max_length if fixed else None
    return big_vision.load_captioner(arrays, size, max_length=length)


def _open_siglip(path, wanted):
    """A model of transformers; the image tower alone if that is enough."""
    if wanted != ["vision_encoder"] and siglip.has_text(path):
        return siglip.load_siglip(path)
    return siglip.load_siglip_vision(path)


def _arrays(source, part, notes):
    """Arrays of `source` by path, resampled to the resolution of `part`."""
    arrays = {
        name: to_numpy(variable)
        for name, variable in variables_by_path(source).items()
    }
    table, grids = arrays.get(_POSITIONS), []
    for layer in (source, part):
        grids.append(getattr(layer, "grid", None))
    if table is not None and all(grids) and grids[0] != grids[1]:
        arrays[_POSITIONS] = resample_positions(table, grids[1], grids[0])
        notes.append(
            "positions resampled from {}x{} to {}x{}".format(
                *grids[0], *grids[1]
            )
        )
    return arrays


def _without_source(model, name, found, variables):
    """Layers of a frozen part that are trained and not in the source.

    Such as the pooling head that is to be trained on frozen patches.

    Args:
        model: The `Task`.
        name: Name of the part.
        found: Arrays of the source by path.
        variables: Variables of the part by path.

    Returns:
        List of the layers' names.
    """
    layers = {path.split("/")[0] for path in variables}
    layers -= {path.split("/")[0] for path in found}
    return sorted(x for x in layers if f"{name}/{x}" in model.trained_parts)


def _other_sizes(source, part, new):
    """Yields a line for each argument that two towers do not share.

    Some of them no array tells: patches of 14 x 16 and 16 x 14 pixels, the
    number of heads.
    """
    for name in _SIZES:
        values = [getattr(layer, name, None) for layer in (source, part)]
        if None in values or values[0] == values[1]:
            continue
        # A head that is new pools what was pooled in another way.
        if name == "pooling" and ("none" in values or "pool" in new):
            continue
        yield f"{name}: {values[0]!r} in the file, {values[1]!r} in the model"


def _differences(found, variables):
    """Yields a line for each array that is missing, extra or misshapen."""
    for name in sorted(found.keys() | variables.keys()):
        shapes = [
            tuple(side[name].shape) if name in side else None
            for side in (found, variables)
        ]
        if None in shapes:
            where = "the model" if shapes[0] is None else "the file"
            yield f"{name}: only in {where}, {shapes[0] or shapes[1]}"
        elif shapes[0] != shapes[1]:
            yield f"{name}: {shapes[0]} in the file, {shapes[1]} in the model"
