"""Writes the BUILD files from the Python files and what they import.

    python tools/update_build.py

Run it after adding, removing or renaming a Python file, or after importing a
new package: one py_library for each folder of modules, one py_binary for each
tool, one py_test for each test file. tests/build_files_test.py fails until
then. tools/requirements_lock.txt, which Bazel installs from, is made anew by
`pip install -e '.[test,beam,serving,interop,parquet]' && pip freeze
--exclude-editable`, without PyTorch's "+cpu".
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "gin": "gin-config",
    "google": "protobuf",
    "grpc": "grpcio",
    "keras_cv": "keras-cv",
    "keras_nlp": "keras-nlp",
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorflow_serving": "tensorflow-serving-api",
    "tensorflow_text": "tensorflow-text",
    "yaml": "pyyaml",
}

# They look at the source tree, of which a Bazel sandbox holds a part.
TREE_TESTS = ("build_files_test", "package_test", "wheel_test")

HEADER = "# Written by tools/update_build.py.\n"

ARRAYS = """\
filegroup(
    name = "arrays",
    srcs = glob(["*.npz"]),
)
"""


def imported_modules(path):
    """Dotted names of all modules a Python file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from cappa_tf import data` names folders, not the package.
            if not all(map(_is_folder, names)):
                found.add(node.module)
            found |= names
    return found


def _is_folder(module):
    return (ROOT / module.replace(".", "/")).is_dir()


def dependencies(paths, own=None):
    """Labels that the files of one target depend on.

    Args:
        paths: Python files.
        own: Label of the target itself, which is left out.

    Returns:
        Sorted labels: "//cappa_tf/data", "//tests:helpers", "@pypi//keras".
    """
    labels = set()
    for path in paths:
        for module in imported_modules(path):
            labels |= _label(module.split("."))
    return sorted(labels - {own}, key=lambda label: (label[0] == "@", label))


def _label(parts):
    """The label that provides one module, as a set of none or one."""
    if parts[0] == "cappa_tf":
        folder = "/".join(parts[:2])
        is_folder = len(parts) > 1 and (ROOT / folder).is_dir()
        return {f"//{folder}" if is_folder else "//cappa_tf"}
    if parts[0] == "tools" and len(parts) > 1:
        is_folder = (ROOT / "tools" / parts[1]).is_dir()
        return {f"//tools{'/' if is_folder else ':'}{parts[1]}"}
    helper = parts[1] if parts[0] == "tests" and len(parts) > 1 else parts[0]
    if (ROOT / "tests" / f"{helper}.py").is_file():
        return {"//tests:helpers"}
    if (ROOT / "tools" / f"{parts[0]}.py").is_file():
        return {f"//tools:{parts[0]}"}
    local = parts[0] in ("cappa_tf", "tests", "tools")
    if local or parts[0] in sys.stdlib_module_names:
        return set()
    name = DISTRIBUTIONS.get(parts[0], parts[0])
    return {f"@pypi//{name.replace('-', '_').lower()}"}


def rule(kind, **attributes):
    """One call of a rule, formatted as buildifier does."""
    lines = [f"{kind}("]
    for name, value in attributes.items():
        if isinstance(value, list) and len(value) > 1:
            items = "".join(f'        "{item}",\n' for item in value)
            lines.append(f"    {name} = [\n{items}    ],")
        elif value:
            text = str(value).replace("'", '"')
            quoted = text if isinstance(value, list) else f'"{text}"'
            lines.append(f"    {name} = {quoted},")
    return "\n".join([*lines, ")\n"])


def _file(kind, rules, test_only=False):
    load = f'load("@rules_python//python:defs.bzl", {kind})\n'
    access = 'package(default_visibility = ["//visibility:public"])\n'
    only = "default_testonly = True, " if test_only else ""
    access = access.replace("package(", f"package({only}")
    return "\n".join([HEADER + load, access, *rules])


def library(folder):
    """BUILD of a folder of modules: one py_library with the folder's name."""
    paths = sorted(folder.glob("*.py"))
    label = f"//{folder.relative_to(ROOT).as_posix()}"
    labels = dependencies(paths, label)
    data = []
    if folder == ROOT / "cappa_tf":
        # Its public names are imported lazily, by their names as strings.
        subfolders = sorted(p.parent.name for p in folder.glob("*/__init__.py"))
        lazy = {f"//cappa_tf/{name}" for name in subfolders}
        labels = sorted({*labels, *lazy}, key=lambda x: (x[0] == "@", x))
        data = ["//gin"]
    names = [path.name for path in paths]
    target = rule(
        "py_library", name=folder.name, srcs=names, data=data, deps=labels
    )
    return _file('"py_library"', [target])


def binaries(folder):
    """BUILD of tools: one py_binary for each file."""
    rules = [
        rule(
            "py_binary",
            name=path.stem,
            srcs=[path.name],
            data=["//gin"],
            deps=dependencies([path], f"//tools:{path.stem}"),
        )
        for path in sorted(folder.glob("*.py"))
    ]
    return _file('"py_binary"', rules)


def tests(folder):
    """BUILD of a folder of tests: helpers, and one py_test for each test."""
    rules = []
    helpers = [p for p in sorted(folder.glob("*.py")) if not _is_test(p)]
    if folder == ROOT / "tests":
        rules.append('exports_files(["run_pytest.py"])\n')
    if any(folder.glob("*.npz")):
        rules.append(ARRAYS)
    if helpers:
        own = f"//{folder.relative_to(ROOT).as_posix()}:helpers"
        rules.append(
            rule(
                "py_library",
                name="helpers",
                srcs=[path.name for path in helpers],
                imports=["."],
                deps=dependencies(helpers, own),
            )
        )
    rules += [_test(path) for path in sorted(folder.glob("*_test.py"))]
    kinds = [kind for kind in ("py_library", "py_test") if kind in str(rules)]
    return _file(", ".join(map('"{}"'.format, kinds)), rules, test_only=True)


def _is_test(path):
    return path.name.endswith("_test.py")


def _test(path):
    main = "//tests:run_pytest.py"
    labels = {*dependencies([path]), "//tests:helpers", "@pypi//pytest"}
    data = ["//:project", "//gin"]
    if "testdata/" in path.read_text(encoding="utf-8"):
        data.append("//tests/testdata:arrays")
    return rule(
        "py_test",
        name=path.stem,
        srcs=[path.name, main],
        args=[f"$(location {path.name})"],
        data=data,
        main=main,
        tags=["manual"] if path.stem in TREE_TESTS else [],
        deps=sorted(labels, key=lambda label: (label[0] == "@", label)),
    )


def build_files():
    """Contents of all BUILD files.

    Returns:
        A dict from path below the repository's root to text.
    """
    found = {
        "BUILD": HEADER + PROJECT,
        "gin/BUILD": HEADER + CONFIGURATIONS,
        "tools/BUILD": binaries(ROOT / "tools"),
    }
    for folder in _folders("cappa_tf") + _folders("tools/benchmarks"):
        found[f"{folder.relative_to(ROOT)}/BUILD"] = library(folder)
    for folder in _folders("tests"):
        found[f"{folder.relative_to(ROOT)}/BUILD"] = tests(folder)
    return found


def _folders(name):
    """A folder and all below it that hold Python files."""
    return sorted({path.parent for path in (ROOT / name).rglob("*.py")})


PROJECT = """
# What tests read besides Python and gin files.
filegroup(
    name = "project",
    srcs = glob([
        "LICENSE",
        "README.md",
        "pyproject.toml",
    ]),
    visibility = ["//visibility:public"],
)
"""

CONFIGURATIONS = """
filegroup(
    name = "gin",
    srcs = glob(["**/*.gin"]),
    visibility = ["//visibility:public"],
)
"""


def main():
    """Writes the files that changed."""
    for name, text in build_files().items():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")


if __name__ == "__main__":
    main()
