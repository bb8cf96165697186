"""The package: fast to import, bounded dependencies, complete lists."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

import cappa_tf
from cappa_tf import commands

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code, cwd, path):
    """Output of an interpreter with the standard library and `path` only."""
    code = f"import sys; sys.path.insert(0, {str(path)!r}); {code}"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout.strip()


def test_importing_it_is_cheap(tmp_path):
    code = "import cappa_tf; print(*sorted(sys.modules))"
    loaded = python(code, tmp_path, ROOT).split()
    assert "cappa_tf" in loaded
    assert not {"tensorflow", "keras", "gin", "numpy", "PIL"} & {*loaded}


@pytest.mark.parametrize("name", cappa_tf.__all__)
def test_every_public_name_is_there(name):
    value = getattr(cappa_tf, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__
    assert name in dir(cappa_tf)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="captoiner"):
        _ = cappa_tf.captoiner


def test_imports_go_down_only():
    """No import cycle among folders; data and models depend on utils only."""
    package = ROOT / "cappa_tf"
    below = {}
    for path in package.rglob("*.py"):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        imported = below.setdefault(part, set())
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                first, _, rest = name.partition(".")
                other = rest.partition(".")[0]
                if first == "cappa_tf" and other != part:
                    imported.add(other)
    graphlib.TopologicalSorter(below).prepare()
    ground = {part for part, imported in below.items() if not imported}
    assert below["data"] | below["models"] <= ground


def test_every_dependency_is_bounded_on_both_sides():
    project = PROJECT["project"]
    groups = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
    ]
    for requirement in [one for group in groups for one in group]:
        bounds = r">=[\d.]+,(!=[\d.]+,)*<[\d.]+$"
        assert re.search(bounds, requirement), requirement


@pytest.mark.parametrize(
    "group, newest", [("dependencies", "2.21.1"), ("tpu", "2.20.1")]
)
def test_tensorflow_and_its_text_ops_are_of_one_minor_version(group, newest):
    project = PROJECT["project"]
    groups = {**project["optional-dependencies"], **project}
    asked = {one.name: one.specifier for one in map(Requirement, groups[group])}
    text = asked["tensorflow-text"]
    for version in ("2.19.0", "2.20.0", "2.20.1", "2.21.1", "2.22.0"):
        assert (version in text) == (version in asked["tensorflow"])
    assert newest in text
    assert "2.21.0" not in text  # Broke keras-hub (its #2979).


def test_a_skipped_test_says_what_to_install():
    """With one of the extras of pyproject.toml, as `.ci/run` installs them."""
    extras = PROJECT["project"]["optional-dependencies"]
    known = [f"pip install '.[{extra}]'" for extra in extras]
    for path in sorted(ROOT.glob("tests/**/*_test.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_skip = isinstance(node, ast.Call) and isinstance(
                node.func, ast.Attribute
            )
            if is_skip and node.func.attr == "importorskip":
                reasons = [ast.unparse(x.value) for x in node.keywords]
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert any(x in y for x in known for y in reasons), where


def test_versions_agree():
    module = (ROOT / "MODULE.bazel").read_text()
    assert f'version = "{cappa_tf.__version__}"' in module


def test_gin_holds_no_python_and_every_folder_is_listed():
    """Python in gin/ would shadow gin-config; an unlisted folder is lost."""
    assert not list((ROOT / "gin").rglob("*.py"))
    folders = [path.parent for path in ROOT.glob("cappa_tf/**/__init__.py")]
    names = {".".join(path.relative_to(ROOT).parts) for path in folders}
    listed = {*PROJECT["tool"]["setuptools"]["packages"]}
    assert listed == names | {"cappa_tf.gin"}


def test_every_command_is_a_tool_that_travels_with_it():
    scripts = PROJECT["project"]["scripts"]
    shipped = PROJECT["tool"]["setuptools"]["py-modules"]
    assert len(scripts) == len(shipped) == 10
    for name, target in scripts.items():
        tool = name.removeprefix("cappa-").replace("-", "_")
        assert target == f"cappa_tf.commands:{tool}"
        assert callable(getattr(commands, tool))
        assert f"cappa_tf.commands.tools.{tool}" in shipped
        assert (ROOT / "tools" / f"{tool}.py").is_file()


def test_help_names_commands_where_there_are_no_files():
    text = "python tools/train_tokenizer.py --output=x, `tools/export.py`"
    found = commands.with_commands(text)
    assert found == "cappa-train-tokenizer --output=x, `cappa-export`"
