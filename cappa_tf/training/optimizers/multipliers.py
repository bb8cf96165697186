"""Multipliers of the learning rate that differ by variable.

`ByPattern` is the reference's `lr_mults`; `ByDepth` is the layer-wise decay of
the learning rate that is common in fine-tuning.
"""

import os
import re

import keras

from cappa_tf.utils.arguments import check_number


class Multipliers:
    """Base class: a subclass implements `factors`."""

    def factors(self, variables):
        """The factors of an optimizer's variables.

        Args:
            variables: List of the variables to train.

        Returns:
            Two lists of floats, in the order of the variables: the factors of
            the learning rate, and those of the weight decay.
        """
        raise NotImplementedError


@keras.saving.register_keras_serializable("cappa_tf")
class ByPattern(Multipliers):
    r"""Learning rate multiplied where a pattern matches the variable's path.

    The first pattern found in a path counts; without one the factor is 1. A
    pattern that no variable has is an error. As in the reference, where the
    decay does not depend on the learning rate, it is not multiplied.

    Example: `ByPattern([("^classifier/head/", 1.0), ("", 0.1)])` trains all
    but the head at a tenth of the rate.

    Args:
        patterns: List of (regular expression, factor).

    Reference: big_vision/optax.py `make`, `lr_mults`.
    """

    def __init__(self, patterns):
        self.patterns = [(str(p), factor) for p, factor in patterns]
        for pattern, factor in self.patterns:
            check_number("patterns", factor)
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    "`patterns` must be regular expressions. Received: "
                    f"{pattern!r} ({error})"
                ) from None

    def factors(self, variables):
        """As `Multipliers.factors`."""
        paths = [variable.path for variable in variables]
        unused = [
            pattern
            for pattern, _ in self.patterns
            if not any(re.search(pattern, path) for path in paths)
        ]
        if unused:
            raise ValueError(
                "`patterns` of multipliers.ByPattern must each be found in a "
                f"variable that is trained, such as {paths[0]!r} or "
                f"{paths[-1]!r}. Received: {unused}"
            )
        rates = [
            next((f for p, f in self.patterns if re.search(p, path)), 1.0)
            for path in paths
        ]
        return rates, [1.0] * len(paths)

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        return {"patterns": self.patterns}

    @classmethod
    def from_config(cls, config):
        """Rebuilds the object from `get_config()`."""
        return cls(**config)


@keras.saving.register_keras_serializable("cappa_tf")
class ByDepth(Multipliers):
    """Learning rate and weight decay that shrink towards the input.

    A tower of n blocks has n + 2 levels: everything before the blocks (level
    0), each block, and everything after them, heads included (level n + 1).
    The factor of level k is `decay ** (n + 1 - k)`. A variable that is in no
    block belongs to the tower whose path has most in common with its own.

    Weight decay is multiplied, too: unlike in the reference, the layers that
    hardly move would otherwise shrink to zero.

    Args:
        decay: Factor from one level to the one below it, in (0, 1]; 1 changes
            nothing.
        block: Regular expression that finds the number of a block, its group
            1, in the path of a variable.
        before: Regular expression found in the names of the layers and
            variables before the blocks.

    Reference: BEiT (arXiv 2106.08254), table 8; MAE (arXiv 2111.06377), table
    9.
    """

    def __init__(
        self,
        decay=0.75,
        block=r"(?:^|[/_])(?:block|layer)s?_(\d+)(?:/|$)",
        before=r"patch|position|posemb|embed|class_token|cls_token",
    ):
        self.decay = check_number("decay", decay, 0.0, 1.0, exclusive=True)
        self.block, self.before = block, before

    def factors(self, variables):
        """As `Multipliers.factors`."""
        paths = [variable.path for variable in variables]
        found = [re.search(self.block, path) for path in paths]
        depths = {}  # path of a tower -> number of its blocks
        for match in filter(None, found):
            tower = _tower(match)
            depths[tower] = max(depths.get(tower, 0), int(match[1]) + 1)
        if not depths:
            raise ValueError(
                "multipliers.ByDepth needs variables inside numbered blocks, "
                f"which `block` finds in their paths. Received: "
                f"block={self.block!r}, paths such as {paths[0]!r}"
            )
        factors = [
            self.decay ** self._levels_above(path, match, depths)
            for path, match in zip(paths, found)
        ]
        return factors, factors

    def _levels_above(self, path, match, depths):
        """Number of levels between a variable and the output of its tower."""
        if match:
            return depths[_tower(match)] - int(match[1])
        # Of the tower whose path has most in common with the variable's.
        tower = max(depths, key=lambda other: len(_common([path, other])))
        inside = path.removeprefix(_common([path, tower]))
        return depths[tower] + 1 if re.search(self.before, inside) else 0

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        return {
            "decay": self.decay,
            "block": self.block,
            "before": self.before,
        }

    @classmethod
    def from_config(cls, config):
        """Rebuilds the object from `get_config()`."""
        return cls(**config)


def _common(paths):
    """The first layers that paths share, ending with "/"."""
    shared = os.path.commonprefix(paths)
    return shared[: shared.rfind("/") + 1]


def _tower(match):
    """Path of the layer that holds a block, ending with "/"."""
    path = match.string[: match.start() + 1]
    return path[: path.rfind("/") + 1]
