"""The commands of an installed package: `cappa-train` is tools/train.py.

pyproject.toml names them. Each runs its file of tools/ as `python` would run
it. That folder is beside the package in a checkout, and in here in a wheel,
so that what a tool adds to `sys.path` (its parent's parent) holds nothing but
tools/ there, too.
"""

import ast
import functools
import pathlib
import re
import sys


def _run(tool):
    """Runs a tool as the main program.

    Args:
        tool: Its name, such as "prepare_data".

    Returns:
        What the program exits with, where it returns.
    """
    path = _folder() / f"{tool}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    docstring = tree.body[0].value
    docstring.value = with_commands(docstring.value)
    main = vars(sys.modules["__main__"])
    main["__file__"] = str(path)
    exec(compile(tree, str(path), "exec"), main)


def _folder():
    package = pathlib.Path(__file__).resolve().parent
    for folder in (package / "tools", package.parents[1] / "tools"):
        if (folder / "train.py").is_file():
            return folder
    raise SystemExit(f"The folder tools/ is missing in {package}.")


def with_commands(text):
    """A help text with `cappa-train` where it says `python tools/train.py`."""
    return re.sub(
        r"(?:python )?\btools/(\w+)\.py",
        lambda found: "cappa-" + found[1].replace("_", "-"),
        text,
    )


caption = functools.partial(_run, "caption")
convert = functools.partial(_run, "convert")
evaluate = functools.partial(_run, "evaluate")
export = functools.partial(_run, "export")
prepare_data = functools.partial(_run, "prepare_data")
serving_client = functools.partial(_run, "serving_client")
train = functools.partial(_run, "train")
train_tokenizer = functools.partial(_run, "train_tokenizer")
