"""Commands of the installed package: `cappa-train` runs tools/train.py.

pyproject.toml lists them. Each runs its file of tools/ as `python` would. That
folder is beside the package in a checkout, and in this folder in a wheel, so
that the path a tool adds to `sys.path` (its parent's parent) contains only
tools/ there.
"""

import ast
import functools
import pathlib
import re
import sys


def run(tool):
    """Runs a tool as the main program.

    Args:
        tool: Name of the tool, such as "prepare_data".
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
    """Replaces `python tools/train.py` by `cappa-train` in a help text."""
    return re.sub(
        r"(?:python )?\btools/(\w+)\.py",
        lambda found: "cappa-" + found[1].replace("_", "-"),
        text,
    )


caption = functools.partial(run, "caption")
compare = functools.partial(run, "compare")
convert = functools.partial(run, "convert")
demo = functools.partial(run, "demo")
evaluate = functools.partial(run, "evaluate")
export = functools.partial(run, "export")
prepare_data = functools.partial(run, "prepare_data")
serving_client = functools.partial(run, "serving_client")
train = functools.partial(run, "train")
train_tokenizer = functools.partial(run, "train_tokenizer")
