"""Captions of picture files, prepared exactly as the evaluation prepared them.

B: batch size.  H, W: height and width the model takes.
"""

import numpy as np

from cappa_tf.data.images import image_files


def caption_pictures(paths, preprocessing, decoder):
    """Captions files, a batch at a time.

    Args:
        paths: Files.
        preprocessing: The model's `ImagePreprocessing`.
        decoder: `CaptionDecoder`.

    Yields:
        (path, row, reason) in the order of `paths`: a `CaptionRow` and None,
        or None and why the file could not be read.
    """
    for start in range(0, len(paths), decoder.batch_size):
        some = paths[start : start + decoder.batch_size]
        pictures, reasons = {}, {}
        for path in some:
            try:
                pictures[path] = preprocessing.read(path)
            except image_files.UnusableError as error:
                reasons[path] = error.reason
        rows = {}
        if pictures:
            images = np.stack(list(pictures.values()))  # [<= B, H, W, 3]
            decoded = decoder.decode(images, list(pictures))
            rows = {row.key: row for row in decoded}
        for path in some:
            yield path, rows.get(path), reasons.get(path)
