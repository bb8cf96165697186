"""Checkpoints to resume a run from, and its best weights so far.

Layout below the run's folder:

    checkpoints/step-<n>.*   model, optimizer, state; the newest N are kept
    best/step-<n>.*          model only, at the best validation so far

A checkpoint is written under a temporary name and then renamed. The file
`checkpoint`, which names the newest one, is replaced after that, and older
checkpoints are deleted last. If the process is killed at any moment, or the
disk is full, the previous checkpoint can still be loaded.
"""

import contextlib
import json
import logging
import os
import re

import tensorflow as tf

from cappa_tf.utils import files

_STATE_KEY = "state/.ATTRIBUTES/py_state"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or does not fit the model."""


class RunState(tf.train.experimental.PythonState):
    """State other than tensors: data position, best metric, inventory.

    Attributes:
        values: Dict that JSON can hold.
    """

    def __init__(self):
        super().__init__()
        self.values = {}

    def serialize(self):
        """The values as JSON; called by TensorFlow when saving."""
        return json.dumps(self.values)

    def deserialize(self, string_value):
        """Reads the values from JSON; called by TensorFlow when restoring."""
        self.values = json.loads(string_value)


class Checkpoints:
    """Saves and restores one run.

    Args:
        folder: The run's folder.
        model: Built Keras model.
        optimizer: Built Keras optimizer.
        keep: Number of checkpoints to keep.
        writes: Whether this process writes; of several hosts only one does.
    """

    def __init__(self, folder, model, optimizer, keep=3, writes=True):
        self.state = RunState()
        self._folder = folder
        self._everything = named_variables(model, optimizer)
        self._weights = named_variables(model)
        self._all = tf.train.Checkpoint(
            variables=self._everything, state=self.state
        )
        self._model = tf.train.Checkpoint(
            variables=self._weights, state=self.state
        )
        self._writes = writes
        self._folders = [
            os.path.join(folder, name) for name in ("checkpoints", "best")
        ]
        if writes:
            for path in self._folders:
                _remove_unfinished(path)
        self._manager, self._best_manager = (
            tf.train.CheckpointManager(
                checkpoint, path, max_to_keep=most, checkpoint_name="step"
            )
            for checkpoint, path, most in zip(
                (self._all, self._model), self._folders, (keep, 1)
            )
        )
        self._saved_step = None

    @property
    def latest(self):
        """Path of the newest checkpoint, or None."""
        return latest_checkpoint(self._folder)

    @property
    def best(self):
        """Path of the best weights so far, or None."""
        return tf.train.latest_checkpoint(self._folders[1])

    def restore(self):
        """Restores the newest checkpoint that can be read.

        Returns:
            Whether there was one. If so, `state.values` is restored, too.

        Raises:
            CheckpointError: If it is of another model or optimizer, or if
                there are checkpoints but none can be read.
        """
        paths = list(reversed(self._manager.checkpoints))
        if self.latest and self.latest not in paths:
            paths.insert(0, self.latest)
        for path in paths:
            try:
                _read(self._all, path, self._everything)
            except (tf.errors.OpError, IndexError) as error:
                # The reader of a truncated file raises IndexError.
                logging.warning("cannot read %s: %s", path, error)
                continue
            self._saved_step = self.state.values["step"]
            return True
        if paths:
            raise CheckpointError(
                f"None of these checkpoints can be read: {paths}. Move the "
                "folder away to start from scratch."
            )
        return False

    def restore_best(self):
        """Restores the best weights; returns whether there are any."""
        if not self.best:
            return False
        values = self.state.values
        _read(self._model, self.best, self._weights)
        self.state.values = values
        return True

    def save(self, step, **values):
        """Writes a checkpoint of `step`, unless it was the last one saved."""
        if step == self._saved_step:
            return
        self._write(self._manager, step, values, self._everything)
        self._saved_step = step

    def save_best(self, step, **values):
        """Writes the weights as the best so far."""
        self._write(self._best_manager, step, values, self._weights)

    def _write(self, manager, step, values, variables):
        if not self._writes:
            return
        inventory = variable_inventory(variables)
        self.state.values = {"step": step, **values, "inventory": inventory}
        try:
            manager.save(checkpoint_number=step)
        except (tf.errors.OpError, OSError) as error:
            _remove_unfinished(manager.directory)
            raise CheckpointError(
                f"Cannot write a checkpoint of step {step} to "
                f"{manager.directory}: {error}. The last good checkpoint is "
                f"{manager.latest_checkpoint}; free some space and run the "
                "same command to resume from there."
            ) from error


def latest_checkpoint(folder):
    """Path of the newest checkpoint of a run, or None.

    Args:
        folder: The run's folder.
    """
    return tf.train.latest_checkpoint(os.path.join(folder, "checkpoints"))


def restore_model(path, model):
    """Restores the weights of a checkpoint into a built model."""
    variables = named_variables(model)
    saved = dict(saved_state(path)["inventory"])
    wanted = variable_inventory(variables)
    check_inventory([[n, saved.get(n)] for n, _ in wanted], wanted, path)
    _read(tf.train.Checkpoint(variables=variables), path)


def read_arrays(path, types):
    """Reads some arrays of a checkpoint, whatever their shapes.

    Args:
        path: Path of the checkpoint.
        types: Dict from the names of arrays (`named_variables`) to their types.

    Returns:
        Dict from a name to a NumPy array, without the names that are missing.
    """
    shapes = dict(saved_state(path)["inventory"])
    found = {
        name: tf.Variable(tf.zeros(shapes[name], dtype))
        for name, dtype in types.items()
        if name in shapes
    }
    _read(tf.train.Checkpoint(variables=found), path)
    return {name: variable.numpy() for name, variable in found.items()}


def _read(checkpoint, path, variables=None):
    if variables is not None:
        saved = saved_state(path)["inventory"]
        check_inventory(saved, variable_inventory(variables), path)
    status = checkpoint.read(path).assert_existing_objects_matched()
    status.expect_partial()  # TensorFlow's own save counter


def saved_state(path):
    """The state values of a checkpoint, without restoring it."""
    # `load_checkpoint` first checks whether the path is a folder, which is true
    # of any prefix of a name on ram://.
    reader = tf.compat.v1.train.NewCheckpointReader(path)
    return json.loads(reader.get_tensor(_STATE_KEY))


def named_variables(model, optimizer=None):
    """All variables by names that depend only on the architecture.

    TensorFlow would follow Python attributes and miss the layers that Keras 3
    keeps in a list, which include all blocks. The paths of Keras are complete,
    but two parts of them are removed: the model's own name, whose presence
    depends on how the model was built, and the numbers that distinguish a
    second model in the same process from the first.

    Args:
        model: Built Keras model.
        optimizer: Built Keras optimizer, or None.

    Returns:
        A dict from name to `tf.Variable`, in order of creation.
    """
    parts = [model, *model.layers]
    variables = list(model.weights)
    if optimizer is not None:
        parts.append(optimizer)
        variables += list(optimizer.variables)
    plain = {part.name: _plain_name(part) for part in parts}
    # Longest first, as a name may be a prefix of another. Optimizers write a_b
    # for a/b.
    names = "|".join(sorted(map(re.escape, plain), key=len, reverse=True))
    pattern = re.compile(rf"(?<![^/_])({names})([/_]|$)")

    def rename(match):
        own = match[1] == model.name
        return "" if own else plain[match[1]] + match[2]

    named = {pattern.sub(rename, v.path): v.value for v in variables}
    if len(named) != len(variables):
        raise ValueError(
            "Every variable must have a name of its own. Received: "
            f"{[v.path for v in variables]}"
        )
    return named


def _plain_name(part):
    return re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", type(part).__name__).lower()


def variable_inventory(variables):
    """Lists [name, shape] of named variables."""
    return [[name, list(v.shape)] for name, v in variables.items()]


def check_inventory(saved, wanted, path):
    """Checks that the variables of a checkpoint are those of the model.

    Args:
        saved: Inventory in the checkpoint.
        wanted: Inventory of the model (and optimizer).
        path: Path of the checkpoint, for the message.

    Raises:
        CheckpointError: If any variable is missing, extra or misshapen; the
            message lists them.
    """
    if saved == wanted:
        return
    have, want = dict(saved), dict(wanted)
    lines = [
        f"  {name}: {have[name]} in the checkpoint, {want[name]} in the model"
        for name in want
        if name in have and have[name] != want[name]
    ]
    lines += [f"  {n}: only in the model" for n in want if n not in have]
    lines += [f"  {n}: only in the checkpoint" for n in have if n not in want]
    more = f"\n  ... and {len(lines) - 12} more" if len(lines) > 12 else ""
    raise CheckpointError(
        f"The checkpoint {path} is of another model or optimizer. Choose "
        "another workdir, or the configuration the run was started with. "
        "Differences:\n" + "\n".join(lines[:12]) + more
    )


def _remove_unfinished(folder):
    """Deletes temporary files and folders of an interrupted write."""
    if not files.isdir(folder):
        return
    for name in files.listdir(folder):
        path = os.path.join(folder, name)
        if "temp" in name and files.isdir(path):
            with contextlib.suppress(OSError):
                files.rmtree(path)
        elif ".tempstate" in name or ".tmp" in name:
            files.remove(path)
