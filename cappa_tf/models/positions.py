"""Position embeddings, learned or fixed, and their resampling.

Resampling is plain NumPy, so that every Keras backend and every converter can
use it.

B: batch.  T: positions of an input.  P: patches.  D: width.
"""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from cappa_tf.utils.arguments import check_choice


def side(patches):
    """Side of a square grid of `patches` patches, or None if there is none."""
    root = math.isqrt(max(patches, 0))
    return root if root > 0 and root * root == patches else None


def square_grid(patches):
    """(rows, columns) of a square grid.

    Raises:
        ValueError: If `patches` is not a square number.
    """
    root = side(patches)
    if root is None:
        raise ValueError(
            f"{patches} positions do not form a square grid, and the arrays "
            "do not tell its sides: pass `image_size=(height, width)`. "
            "Received: image_size=None, or one of another number of patches."
        )
    return root, root


def resample_positions(table, grid, old_grid=None):
    """Resamples positions to another grid, bilinearly with fixed corners.

    Args:
        table: [1, P, D].
        grid: (rows, columns) of the result.
        old_grid: (rows, columns) of the table. None means `grid` if that has
            P patches, else a square.

    Returns:
        [1, rows * columns, D]; the table itself if nothing changes.

    Reference: big_vision models/vit.py `resample_posemb`
    (`scipy.ndimage.zoom` of order 1). Deviations: the new grid need not be
    square, and its last row and column are never lost. SciPy sets them to
    zero for pairs of sizes where its rounded arithmetic ends beyond the old
    grid (16 to 30, 32 to 16; no size up to 79 from 7, 14 or 27).
    """
    if old_grid is None and grid[0] * grid[1] == table.shape[1]:
        return table
    rows, columns = old_grid or square_grid(table.shape[1])
    if (rows, columns) == tuple(grid):
        return table
    width = table.shape[2]
    image = table.reshape(rows, columns, width).astype(np.float64)
    image = np.einsum("ir,rcd->icd", _interpolation(rows, grid[0]), image)
    image = np.einsum("jc,icd->ijd", _interpolation(columns, grid[1]), image)
    return image.reshape(1, -1, width).astype(table.dtype)


def _interpolation(old, new):
    """Matrix [new, old] of linear interpolation with fixed end points."""
    position = np.arange(new) * ((old - 1) / max(new - 1, 1))
    low = np.clip(np.floor(position).astype(int), 0, max(old - 2, 0))
    share = position - low
    matrix = np.zeros((new, old))
    matrix[np.arange(new), low] = 1.0 - share
    matrix[np.arange(new), np.minimum(low + 1, old - 1)] += share
    return matrix


def sincos2d(height, width, dim, temperature=10_000.0, stretched_to=None):
    """Fixed two-dimensional sine / cosine positions (MoCo v3's order).

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        dim: Width D of the embedding, a multiple of 4 and at least 8.
        temperature: Ratio of the longest to the shortest wavelength.
        stretched_to: (rows, columns) of a grid whose corners have the same
            positions as those of this one; itself by default.

    Returns:
        NumPy float32 [1, height * width, dim]: sin(x), cos(x), sin(y), cos(y).

    Reference: big_vision models/vit.py `posemb_sincos_2d`.
    """
    if dim % 4 != 0 or dim < 8:
        raise ValueError(
            "sincos2d positions need a width that is a multiple of 4 and at "
            f"least 8. Received: dim={dim}"
        )
    omega = np.arange(dim // 4) / (dim // 4 - 1)
    omega = 1.0 / temperature**omega
    y, x = np.mgrid[:height, :width]
    if stretched_to is not None:
        y = y * ((stretched_to[0] - 1) / max(height - 1, 1))
        x = x * ((stretched_to[1] - 1) / max(width - 1, 1))
    y = y.reshape(-1, 1) * omega  # -> [P, D / 4]
    x = x.reshape(-1, 1) * omega
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)
    return table[None].astype("float32")


@keras.saving.register_keras_serializable("cappa_tf")
class PositionEmbedding(keras.layers.Layer):
    """Adds position embeddings of a grid (image patches, or a row of text).

    Args:
        grid: (rows, columns); text of length L has the grid (1, L).
        kind: "learned" (initialized with N(0, 1/sqrt(D))), "sincos2d" (fixed)
            or "factorised": the sum of a learned embedding of the row and one
            of the column, of the same total variance.
        table_grid: (rows, columns) of the tables of factorised positions, by
            default `grid`. Another grid is interpolated from them, linearly
            with fixed end points, so that one set of weights serves all
            resolutions. Likewise sincos2d positions of `grid` are stretched
            to this one.

    Reference of factorised positions: borisdayma/clip-jax
    clip_jax/modeling.py `CLIPVisionEmbeddings`.
    """

    def __init__(self, grid, kind="learned", table_grid=None, **kwargs):
        super().__init__(**kwargs)
        check_choice(("learned", "sincos2d", "factorised"), kind=kind)
        self.grid = tuple(grid)
        self.kind = kind
        self.table_grid = tuple(table_grid or grid)

    def build(self, input_shape):
        """Creates the table [1, rows * columns, D], or both its factors."""
        dim = input_shape[-1]
        rows, columns = self.grid
        if self.kind == "sincos2d":
            self.position_embedding = sincos2d(
                rows, columns, dim, stretched_to=self.table_grid
            )
            return
        if self.kind == "factorised":
            self.rows, self.columns = (
                self.add_weight(
                    name=name,
                    shape=(1, size, dim),
                    initializer=keras.initializers.RandomNormal(
                        stddev=(2 * dim) ** -0.5
                    ),
                )
                for name, size in zip(("rows", "columns"), self.table_grid)
            )
            return
        self.position_embedding = self.add_weight(
            name="position_embedding",
            shape=(1, rows * columns, dim),
            initializer=keras.initializers.RandomNormal(stddev=dim**-0.5),
        )

    def table(self):
        """The positions [1, rows * columns, D] in the compute dtype."""
        if self.kind != "factorised":
            return ops.cast(self.position_embedding, self.compute_dtype)
        rows, columns = (
            _stretched(ops.cast(table, "float32")[0], size)
            for table, size in zip((self.rows, self.columns), self.grid)
        )
        table = rows[:, None] + columns[None]  # -> [rows, columns, D]
        table = ops.reshape(table, (1, -1, table.shape[-1]))
        return ops.cast(table, self.compute_dtype)

    def apply(self, x, positions=None):
        """Adds positions to x [B, T, D].

        Args:
            x: [B, T, D].
            positions: int [1 or B, T], the position of each input; by default
                the first T.
        """
        if positions is None:
            return x + self.table()[:, : ops.shape(x)[1]]
        return x + ops.take(self.table()[0], positions, axis=0)

    def call(self, x, positions=None):
        """The same as `apply`."""
        return self.apply(x, positions)

    def rotation(self, head_dim, positions):
        """None: these positions do not rotate queries and keys."""
        del head_dim, positions

    def compute_output_shape(self, input_shape, *unused, **also_unused):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "grid": self.grid,
            "kind": self.kind,
            "table_grid": self.table_grid,
        }


def _stretched(table, size):
    """Resamples a float32 table [N, D] to [size, D] if the sizes differ."""
    if table.shape[0] == size:
        return table
    matrix = _interpolation(table.shape[0], size)
    return ops.matmul(ops.convert_to_tensor(matrix, "float32"), table)


@keras.saving.register_keras_serializable("cappa_tf")
class RotaryPositions(keras.layers.Layer):
    """Rotates queries and keys by their position; adds nothing to the input.

    Dimension i of a head is paired with i + C / 2, and the pair is turned by
    position * max_wavelength^(-2 i / C). So attention sees differences of
    positions only. There are no weights.

    Args:
        max_wavelength: Base of the wavelengths.

    Reference: arXiv 2104.09864; borisdayma/clip-jax clip_jax/modeling.py
    `RotaryEmbedding` (which pairs halves, not neighbors as in the paper).
    """

    def __init__(self, max_wavelength=10_000.0, **kwargs):
        super().__init__(**kwargs)
        self.max_wavelength = max_wavelength

    def build(self, input_shape):
        """Creates nothing."""
        del input_shape

    def apply(self, x, positions=None):
        """Returns x."""
        del positions
        return x

    def call(self, x, positions=None):
        """The same as `apply`."""
        return self.apply(x, positions)

    def rotation(self, head_dim, positions):
        """The rotation of these positions.

        Args:
            head_dim: C, even.
            positions: int [1 or B, T].

        Returns:
            `Rotation`.
        """
        powers = -2.0 * np.arange(head_dim // 2) / head_dim
        frequencies = (self.max_wavelength**powers).astype(np.float32)
        angles = ops.cast(positions, "float32")[..., None, None] * frequencies
        return Rotation(ops.cos(angles), ops.sin(angles))

    def compute_output_shape(self, input_shape, *unused, **also_unused):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "max_wavelength": self.max_wavelength,
        }


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A rotation of queries and keys, by the positions of a text.

    It is an object, as Keras would cast tensors that are arguments of a layer
    to the compute dtype.

    Attributes:
        cosine: float32 [1 or B, T, 1, C / 2].
        sine: float32 of the same shape.
    """

    cosine: object
    sine: object

    def __call__(self, x):
        """Rotates queries or keys [B, T, H, C]."""
        a, b = ops.split(ops.cast(x, "float32"), 2, axis=-1)
        rotated = [
            a * self.cosine - b * self.sine,
            b * self.cosine + a * self.sine,
        ]
        return ops.cast(ops.concatenate(rotated, axis=-1), x.dtype)


def rotate(x, rotation):
    """Rotates x [B, T, H, C]; a rotation of None returns it as it is."""
    return x if rotation is None else rotation(x)
