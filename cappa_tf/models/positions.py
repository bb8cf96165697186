"""Learned positions at another resolution.

NumPy alone, so that every Keras backend and every converter shares it.

P: patches.  D: width.
"""

import math

import numpy as np


def side(patches):
    """Side of a square grid of that many patches, or None."""
    root = math.isqrt(max(patches, 0))
    return root if root > 0 and root * root == patches else None


def square_grid(patches):
    """(rows, columns) of a square grid.

    Raises:
        ValueError: If that many patches are no square.
    """
    root = side(patches)
    if root is None:
        raise ValueError(
            f"{patches} positions are not a square grid, and the arrays do "
            "not tell its sides: pass `image_size=(height, width)`. "
            "Received: image_size=None, or one of another number of patches."
        )
    return root, root


def resample_positions(table, grid, old_grid=None):
    """Positions for another resolution, bilinear with fixed corners.

    Args:
        table: [1, P, D].
        grid: (rows, columns) wanted.
        old_grid: (rows, columns) of the table. Where it is not known (None),
            P patches as wanted are taken for the wanted grid, others for a
            square.

    Returns:
        [1, rows * columns, D]; the table itself if nothing changes.

    Reference: big_vision models/vit.py `resample_posemb`
    (`scipy.ndimage.zoom` of order 1). Deviations: the new grid need not be
    square, and its last row and column are never lost. SciPy sets them to
    zero for the pairs of sizes where its arithmetic, rounded, ends beyond the
    old grid (16 to 30, 32 to 16; no size up to 79 from 7, 14 or 27).
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
    """Matrix [new, old] that interpolates linearly, ends on ends."""
    position = np.arange(new) * ((old - 1) / max(new - 1, 1))
    low = np.clip(np.floor(position).astype(int), 0, max(old - 2, 0))
    share = position - low
    matrix = np.zeros((new, old))
    matrix[np.arange(new), low] = 1.0 - share
    matrix[np.arange(new), np.minimum(low + 1, old - 1)] += share
    return matrix
