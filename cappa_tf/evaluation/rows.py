"""Pictures of a folder, read and checked as they are evaluated."""

import concurrent.futures
import itertools
import os

from absl import logging

from cappa_tf.data.sources import image_rows

# So many names of each reason are logged.
MOST_NAMES = 5


def list_rows(path, log=True):
    """Lists the images of a folder and logs what of it is not understood.

    Args:
        path: As `image_rows.read_rows`.
        log: Whether to log, as at the first of several readings.

    Returns:
        (list of `image_rows.Row`s, counter of what was left out by reason).
    """
    skipped = image_rows.Skipped()
    found = image_rows.read_rows(path, skipped=skipped)
    named = skipped.names(MOST_NAMES) if log else {}
    for reason, names in named.items():
        logging.warning(
            "%s: skipped %d x %s: %s%s",
            path,
            skipped.counts[reason],
            reason,
            "; ".join(names),
            "; ..." if skipped.counts[reason] > MOST_NAMES else "",
        )
    return found, skipped.counts


def read_examples(rows, skipped, options=None, classes=()):
    """Reads, checks and cleans the pictures and captions of rows.

    Args:
        rows: Iterable of `image_rows.Row`s.
        skipped: A `image_rows.Skipped` that takes what is left out.
        options: `image_rows.Options`.
        classes: `image_rows.class_names` of the rows; the label of one
            becomes its position.

    Yields:
        `Example`s in the order of the rows.
    """
    options = options or image_rows.Options()
    numbers = {name: i for i, name in enumerate(classes)}
    workers = os.cpu_count() or 1
    rows, seen = iter(rows), set()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while some := list(itertools.islice(rows, 8 * workers)):
            found = pool.map(
                lambda row: image_rows.read_example(row, options, numbers),
                some,
            )
            for row, (example, reasons) in zip(some, found):
                for reason, name in reasons:
                    skipped.add(reason, name)
                if example is not None and row.key in seen:
                    skipped.add("repeated key", row.key)
                elif example is not None:
                    seen.add(row.key)
                    yield example
