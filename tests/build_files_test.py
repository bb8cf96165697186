"""The Bazel files name every file and every import.

Each is evaluated here as Bazel would do it: Starlark, restricted to what a
BUILD file may hold, is a subset of Python.
"""

import ast
import pathlib
import re
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Bazel refuses functions, loops, f-strings, `*` and all else that is not here.
STARLARK = set(
    """Add Assign Attribute BinOp Call Compare Constant Expr IfExp In List
    ListComp Load Mod Module Name Slice Store Subscript USub UnaryOp
    comprehension keyword""".split()
)

# Import name -> the distribution of pyproject.toml that brings it, where the
# names differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "h5py": "keras",
    "gin": "gin-config",
    "google": "tensorflow",
    "grpc": "tensorflow-serving-api",
    "keras_hub": "keras-nlp",
    "ml_dtypes": "tensorflow",
    "packaging": "pytest",
    "tensorflow_serving": "tensorflow-serving-api",
}

# Programs that benchmarks start with packages that nothing else needs.
OTHER_ENVIRONMENTS = [
    ROOT / "tools/benchmarks/workers" / name
    for name in ("peers.py", "reference.py")
]


def evaluate(path):
    """{name: (rule, attributes)} of one BUILD or MODULE.bazel file."""
    tree = ast.parse(path.read_text())
    kinds = {type(node).__name__ for node in ast.walk(tree)}
    assert kinds <= STARLARK, path
    package, targets = path.parent, {}

    def is_in_package(file):
        # Bazel's glob enters no folder that has a BUILD file of its own.
        folders = list(file.relative_to(package).parents)[:-1]
        names = ("BUILD", "BUILD.bazel")
        return not any(
            (package / x / y).exists() for x in folders for y in names
        )

    def glob(patterns, exclude=()):
        found = {file for one in patterns for file in package.glob(one)}
        found -= {file for one in exclude for file in package.glob(one)}
        kept = filter(is_in_package, found)
        return sorted(file.relative_to(package).as_posix() for file in kept)

    def rule(kind):
        def add(name, **attributes):
            assert name not in targets, name
            targets[name] = (kind, attributes)

        return add

    def ignore(*args, **kwargs):
        del args, kwargs

    rules = ("py_binary", "py_library", "py_test")
    names = {
        "__builtins__": {"len": len, "True": True, "False": False},
        "exports_files": ignore,
        "glob": glob,
        "load": ignore,
        "package": ignore,
        **{kind: rule(kind) for kind in rules},
    }
    exec(compile(tree, path, "exec"), names)
    return targets


@pytest.fixture(name="targets", scope="module")
def _targets():
    """{label: (rule, attributes)} of all BUILD files."""
    found = {}
    for folder in ("", "tools", "tests"):
        for name, target in evaluate(ROOT / folder / "BUILD").items():
            found[f"//{folder}:{name}"] = target
    return found


def third_party(folder):
    """Distributions that the Python files below a folder import."""
    found = set()
    own = {"cappa_tf", "tools", *(x.stem for x in ROOT.glob("tests/*.py"))}
    for path in (ROOT / folder).rglob("*.py"):
        if path in OTHER_ENVIRONMENTS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    found -= own | sys.stdlib_module_names
    return {DISTRIBUTIONS.get(x, x.replace("_", "-")) for x in found}


def named(attributes):
    """Distributions that a target depends on by itself."""
    hub = "@pypi//"
    labels = [x for x in attributes["deps"] if x.startswith(hub)]
    return {x.removeprefix(hub).replace("_", "-") for x in labels}


def files(pattern):
    """Paths below the repository's root, as in a label of the root package."""
    return {x.relative_to(ROOT).as_posix() for x in ROOT.glob(pattern)}


def test_the_library_holds_all_modules_and_gin_files(targets):
    kind, attributes = targets["//:cappa_tf"]
    assert kind == "py_library"
    assert set(attributes["srcs"]) == files("cappa_tf/**/*.py")
    gin, data = files("gin/**/*.gin"), set(attributes["data"])
    page = files("cappa_tf/demo/page/*")
    assert gin and page and data >= gin | page
    others = data - gin - page
    assert all(x.startswith("cappa_tf/shipped/") for x in others)


def test_every_tool_is_a_program(targets):
    for name in files("tools/*.py"):
        file = name.removeprefix("tools/")
        kind, attributes = targets[f"//tools:{file.removesuffix('.py')}"]
        assert (kind, attributes["srcs"]) == ("py_binary", [file])
    _, modules = targets["//tools:tools"]
    assert {f"tools/{x}" for x in modules["srcs"]} == files("tools/**/*.py")


def test_every_test_runs_and_every_helper_comes_with_it(targets):
    tested = set()
    for kind, attributes in targets.values():
        if kind == "py_test":
            file, runner = attributes["srcs"]
            assert runner == attributes["main"] == "run_pytest.py"
            assert attributes["args"] == [f"$(location {file})"]
            tested.add(f"tests/{file}")
    assert tested == files("tests/**/*_test.py")
    _, helpers = targets["//tests:helpers"]
    helping = {f"tests/{x}" for x in helpers["srcs"]}
    assert helping == files("tests/**/*.py") - tested
    arrays = {f"tests/{x}" for x in helpers["data"] if x[:2] != "//"}
    assert arrays == files("tests/**/*.npz") != set()


def test_every_import_is_a_dependency_and_the_other_way(targets):
    library = named(targets["//:cappa_tf"][1])
    assert library == third_party("cappa_tf")
    assert third_party("tools") <= library
    tests = named(targets["//tests:helpers"][1])
    assert tests == third_party("tests") - library


def test_every_dependency_is_a_target_or_installed(targets):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"]]
    groups += project["optional-dependencies"].values()
    asked = {re.match(r"[\w-]+", x)[0] for group in groups for x in group}
    lock = (ROOT / "tools/requirements_lock.txt").read_text()
    locked = set(re.findall(r"^([\w-]+)==", lock.replace("_", "-"), re.M))
    for label, (_, attributes) in targets.items():
        assert named(attributes) <= asked & locked, label
        package = label.partition(":")[0]
        for other in attributes["deps"]:
            if not other.startswith("@"):
                other = package + other if other[0] == ":" else other
                known = {other, f"{other}:{other.removeprefix('//')}"}
                assert known & targets.keys(), f"{label} -> {other}"


def test_the_module_file_is_starlark():
    tree = ast.parse((ROOT / "MODULE.bazel").read_text())
    assert {type(node).__name__ for node in ast.walk(tree)} <= STARLARK
