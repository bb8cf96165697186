"""First weights of a run, read from another run or from a model's file.

Parts (`Task.parts`) are matched by name, their arrays by path. Learned
positions of an image are resampled where the resolution is another; whatever
else differs is refused, with both sides.
"""

from cappa_tf.models.positions import resample_positions
from cappa_tf.models.task import Task
from cappa_tf.saving import big_vision
from cappa_tf.saving.checkpoints import latest_checkpoint
from cappa_tf.saving.run_folder import load_model
from cappa_tf.saving.weights import to_numpy, variables_by_path

_POSITIONS = "positions/position_embedding"
# Differences that a message lists.
_MOST_LINES = 12


def first_weights(model, weights, workdir):
    """Initializes the model of a run that has no checkpoint yet.

    Args:
        model: Built `Task`.
        weights: The run's `WeightSettings`.
        workdir: The run's folder: a run that resumes reads nothing but its
            own checkpoint.

    Returns:
        A line for the log that says what was read, or None.

    Raises:
        ValueError: As `initialize`.
    """
    if weights.initialize_from is None or latest_checkpoint(workdir):
        return None
    return initialize(model, weights.initialize_from, weights.initialize_parts)


def initialize(model, path, parts=None):
    """Puts the weights of another model into a built one.

    Args:
        model: Built `Task`.
        path: Folder of a run (its final, else its best, else its newest
            weights), `.keras` file of a captioner or of a vision encoder, or
            npz file of big_vision.
        parts: Names of the parts to read; None for all of the model.

    Returns:
        A line for the log that says what was read.

    Raises:
        ValueError: Nothing can be read at `path`, it lacks a part, or arrays
            do not fit; the message lists what each side has.
    """
    wanted = list(model.parts) if parts is None else list(parts)
    _check_parts(
        "`initialize_parts` must be among the parts of the model",
        wanted,
        model.parts,
    )
    source = _open(path, model, wanted)
    _check_parts(
        f"`initialize_from` must have what is read from it. {path} has the "
        "parts",
        wanted,
        source,
    )
    problems, pairs, notes = [], [], []
    for name in wanted:
        found = _arrays(source[name], model.parts[name], notes)
        variables = variables_by_path(model.parts[name])
        problems += [
            f"  {name}/{line}" for line in _differences(found, variables)
        ]
        pairs += [(v, found.get(key)) for key, v in variables.items()]
    if problems:
        more = len(problems) - _MOST_LINES
        problems[_MOST_LINES:] = [f"  ... and {more} more"] * (more > 0)
        raise ValueError(
            f"`initialize_from` must fit the model. Received: {path}, where "
            "these differ:\n" + "\n".join(problems)
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
            f"{rule} {list(parts)}: name those to read in `initialize_parts` "
            f"(INITIALIZE_PARTS). Received: {missing}"
        )


def _open(path, model, wanted):
    """The parts of the model at `path`, as a dict of layers."""
    try:
        if path.endswith(".npz"):
            found = _open_npz(path, model, wanted)
        else:
            found = load_model(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"`initialize_from` (INITIALIZE_FROM) cannot be read: {error}"
        ) from error
    return found.parts if isinstance(found, Task) else {"vision_encoder": found}


def _open_npz(path, model, wanted):
    """A model of big_vision; what its arrays do not tell is the model's."""
    arrays = big_vision.read_arrays(path)
    size = getattr(model.parts.get("vision_encoder"), "image_size", None)
    if wanted == ["vision_encoder"] or not big_vision.is_captioner(arrays):
        return big_vision.load_vision_encoder(arrays, size)
    decoder = model.parts.get("text_decoder")
    # Learned positions of a text tell its length.
    fixed = getattr(decoder, "position_embedding", None) == "sincos2d"
    length = decoder.max_length if fixed else None
    return big_vision.load_captioner(arrays, size, max_length=length)


def _arrays(source, part, notes):
    """Arrays of a part by path, for the resolution of another."""
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


def _differences(found, variables):
    """Lines, one for each array that is missing, left over or misshapen."""
    for name in sorted(found.keys() | variables.keys()):
        shapes = [
            tuple(side[name].shape) if name in side else None
            for side in (found, variables)
        ]
        if None in shapes:
            where = "the model" if shapes[0] is None else "what is read"
            yield f"{name}: only in {where}, {shapes[0] or shapes[1]}"
        elif shapes[0] != shapes[1]:
            yield f"{name}: {shapes[0]} is read, {shapes[1]} in the model"
