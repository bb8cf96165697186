"""Runs a tool by its name: `python -m cappa_tf.commands train --help`."""

import sys

from cappa_tf import commands

if __name__ == "__main__":
    commands.run(sys.argv.pop(1))
