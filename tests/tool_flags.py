"""Flags of a tool in tests that run its `main` in this process."""

import contextlib

from absl import flags


@contextlib.contextmanager
def defined(tool):
    """Defines a tool's flags among absl's, as long as the block runs.

    Args:
        tool: The module.

    Yields:
        The module.
    """
    before = set(flags.FLAGS)
    tool.define_flags()
    try:
        yield tool
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
