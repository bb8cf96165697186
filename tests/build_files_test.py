"""The BUILD files describe the tree: read here as Bazel would read them."""

import ast
import pathlib
import re

import pytest

from tools import update_build

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("cappa_tf", "tests", "tools")
RULES = ("py_binary", "py_library", "py_test")


def read_targets():
    """{label: (kind, attributes)} of all BUILD files."""
    targets = {}
    for path in [ROOT / "BUILD", *ROOT.glob("gin/BUILD")] + [
        path for folder in FOLDERS for path in (ROOT / folder).rglob("BUILD")
    ]:
        package = path.parent.relative_to(ROOT).as_posix().replace(".", "")
        for node in ast.parse(path.read_text()).body:
            call = node.value
            attributes = {
                keyword.arg: _literal(keyword.value)
                for keyword in call.keywords
            }
            if "name" in attributes:
                label = f"//{package}:{attributes['name']}"
                assert label not in targets, f"twice: {label}"
                targets[label] = (call.func.id, attributes)
    return targets


def _literal(node):
    try:
        return ast.literal_eval(node)
    except ValueError:  # glob([...])
        return ast.unparse(node)


def full_label(label):
    """//a/b -> //a/b:b."""
    package = label.removeprefix("//")
    return label if ":" in label else f"{label}:{package.split('/')[-1]}"


@pytest.fixture(name="targets", scope="module")
def _targets():
    return read_targets()


def test_they_are_what_the_script_writes():
    stale = [
        name
        for name, text in update_build.build_files().items()
        if not (ROOT / name).is_file() or (ROOT / name).read_text() != text
    ]
    assert not stale, "run `python tools/update_build.py`"


def test_every_python_file_is_in_one_target_of_the_right_kind(targets):
    owners = {}
    for label, (kind, attributes) in targets.items():
        package = label.removeprefix("//").split(":")[0]
        for source in attributes.get("srcs", ()) if kind in RULES else ():
            if not source.startswith("//"):
                owners.setdefault(f"{package}/{source}", []).append(kind)
    expected = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            is_tool = path.parent == ROOT / "tools"
            kind = "py_binary" if is_tool else "py_library"
            is_test = path.name.endswith("_test.py")
            name = path.relative_to(ROOT).as_posix()
            expected[name] = ["py_test" if is_test else kind]
    assert owners == expected


def test_every_dependency_exists(targets):
    lock = ROOT / "tools/requirements_lock.txt"
    locked = {
        line.split("==")[0].replace("-", "_")
        for line in lock.read_text().splitlines()
        if "==" in line
    }
    optional = {"keras_cv"}
    for label, (_, attributes) in targets.items():
        for dependency in attributes.get("deps", ()):
            if dependency.startswith("@pypi//"):
                name = dependency.removeprefix("@pypi//")
                assert name in locked | optional, f"{label}: {name}"
            else:
                assert full_label(dependency) in targets, label


def test_every_import_is_a_dependency(targets):
    for label, (kind, attributes) in targets.items():
        if kind not in RULES:
            continue
        package = label.removeprefix("//").split(":")[0]
        declared = {full_label(x) for x in attributes.get("deps", ())}
        for source in attributes["srcs"]:
            path = ROOT / package / source
            if source.startswith("//"):
                continue
            text = path.read_text()
            for folder in re.findall(r"^\s*from cappa_tf\.(\w+)", text, re.M):
                is_folder = (ROOT / "cappa_tf" / folder).is_dir()
                needed = full_label(
                    f"//cappa_tf/{folder}" if is_folder else "//cappa_tf"
                )
                assert needed in declared | {label}, f"{path} -> {needed}"


def test_libraries_depend_one_way(targets):
    """No circle: layers of the design are layers of the code."""
    depends = {
        label: [
            full_label(other)
            for other in attributes.get("deps", ())
            if not other.startswith("@")
        ]
        for label, (kind, attributes) in targets.items()
        if kind == "py_library"
    }
    finished = set()

    def visit(label, path):
        assert label not in path, " -> ".join([*path, label])
        if label not in finished:
            for other in depends[label]:
                visit(other, [*path, label])
            finished.add(label)

    for label in depends:
        visit(label, [])
    for low in ("data", "models"):
        others = set(depends[f"//cappa_tf/{low}:{low}"])
        assert others <= {"//cappa_tf/checks:checks"}, low
