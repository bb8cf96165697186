"""README.md and docs/: their links, commands, files and bindings are there."""

import ast
import copy
import importlib
import importlib.util
import json
import pathlib
import re
import shlex
import tomllib

import labelled
import pytest
import tool_flags
from absl import flags

import cappa_tf
from cappa_tf import config

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
ADDED = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Variables of the environment, and the name of a file.
ENVIRONMENT = {"TF_CONFIG", "TPU_NAME", "VERSION", "DOCKER", "MASK", "BUILD"}
ENVIRONMENT |= {"KERAS_BACKEND", "TF_CPP_MIN_LOG_LEVEL", "SERVING_ADDRESS"}


def text_and_blocks(page):
    """A page without its fenced blocks, and the blocks as (language, text)."""
    text = page.read_text()
    pattern = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
    return pattern.sub("", text), pattern.findall(text)


def anchors(page):
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    text, _ = text_and_blocks(page)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"[^\w\s-]", "", heading.replace("\\", "")).strip()
        found.add(re.sub(r"\s", "-", plain.lower()))
    return found


def commands(page):
    """Commands that run a tool: (words, whether the command is complete)."""
    text, blocks = text_and_blocks(page)
    for language, block in blocks:
        block = block.replace("\\\n", " ") if language == "sh" else ""
        for line in re.split(r"\n|&&", block):
            start = line.find("python tools/")
            if start >= 0:
                yield words(line[start:]), True
    for code in re.findall(r"`([^`]+)`", text):
        code = " ".join(code.split())
        if re.match(r"(python )?tools/\w+\.py\b", code):
            yield words(code), code.startswith("python ")


def words(line):
    """The words of a command after "python", up to a redirection."""
    try:
        found = shlex.split(line, comments=True)
    except ValueError:  # The last line of a script in quotation marks.
        found = shlex.split(line.rstrip("'"), comments=True)
    found = found[found[0] == "python" :]
    stop = [i for i, word in enumerate(found) if word in ("|", ">", "--")]
    return found[: min(stop, default=len(found))]


def parsed(line, whole, monkeypatch):
    """The flags of a command; a part of one may lack required flags."""
    module = importlib.import_module(line[0][:-3].replace("/", "."))
    monkeypatch.setattr("sys.argv", line)
    with tool_flags.defined(module):
        values = copy.deepcopy(flags.FLAGS)
        for name in () if whole else values:
            values[name].validators.clear()
        values(line)
        return values.flag_values_dict()


EVERY = [
    pytest.param(line, whole, id=f"{name}-{' '.join(line)}")
    for name, page in zip(NAMES, PAGES)
    for line, whole in commands(page)
]


@pytest.mark.parametrize(("line", "whole"), EVERY)
def test_a_command_has_only_flags_of_its_tool(line, whole, monkeypatch):
    if line[1:] or line[0] != "tools/benchmark.py":
        parsed(line, whole, monkeypatch)


def test_every_tool_is_shown():
    shown = {one.values[0][0] for one in EVERY}
    assert len(EVERY) > 80
    assert {f"tools/{x.name}" for x in ROOT.glob("tools/*.py")} == shown


TRAINING = [
    one
    for one in EVERY
    if one.values[0][0] == "tools/train.py"
    and any(word.startswith("--gin_file") for word in one.values[0])
]


@pytest.fixture(name="users_files", scope="module")
def _users_files(tmp_path_factory):
    """Bindings in place of what a user has: an encoder, labels, a gin file."""
    folder = tmp_path_factory.mktemp("user")
    labelled.keras_model(pool=False).save(folder / "encoder.keras")
    data = labelled.write(
        folder / "data", {"train": [0, 1]}, classes=["a", "b"]
    )
    encoder = f"ENCODER={str(folder / 'encoder.keras')!r}"
    (folder / "mine.gin").write_text(
        f"DATA = ['a', 'b']\nPROMPTS = ['caption:', 'read:']\n"
        f"WEIGHTS = [4, 1]\nTOKENIZER = 'a'\n{encoder}\nIMAGE_SIZE = 16\n"
    )
    return folder, encoder, f"DATA={data!r}"


@pytest.mark.parametrize(("line", "whole"), TRAINING)
def test_a_training_command_can_be_parsed(
    line, whole, monkeypatch, users_files
):
    values = parsed(line, whole, monkeypatch)
    folder, *bindings = users_files
    files = [
        path.replace("mine.gin", str(folder / "mine.gin"))
        for path in values["gin_file"]
    ]
    params = list(values["gin_param"])
    if any("transfer" in path for path in files):
        # What is opened already when it is parsed.
        for binding in bindings:
            name = binding.partition("=")[0]
            given = [x for x in params if x.startswith(f"{name}=")]
            params = [binding if x in given else x for x in params]
    config.parse(files, params, workdir=values["workdir"] or "runs/test")


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    page = ROOT / name
    text, _ = text_and_blocks(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file), target


def test_what_is_named_is_there():
    texts = [page.read_text() for page in (*PAGES, *ADDED)]
    named = "\n".join(texts)
    files = re.findall(
        r"(?<![\w/.-])(?:cappa_tf|gin|tests|tools|docs)/[\w./]+\.\w+", named
    )
    assert len(files) > 100
    assert not [name for name in files if not (ROOT / name).exists()]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"pip install (?:-e )?'\.\[([\w,]+)\]'", named)
    used = {name for group in extras for name in group.split(",")}
    assert "test" in used
    assert used <= project["optional-dependencies"].keys()


def test_every_macro_exists():
    gin = "\n".join(path.read_text() for path in ROOT.glob("gin/**/*.gin"))
    macros = {*re.findall(r"^([A-Z_]+) =", gin, re.M)}
    for page in PAGES:
        text, _ = text_and_blocks(page)
        named = re.findall(r"`([A-Z][A-Z_]{3,})(?:=[^`]*)?`", text)
        assert not {*named} - macros - ENVIRONMENT, page.name


def test_every_binding_in_the_text_can_be_parsed():
    found = []
    for page in PAGES:
        text, _ = text_and_blocks(page)
        for code in re.findall(r"`([^`]+)`", text):
            if code.startswith("--gin_param="):
                found.append(shlex.split(code)[0].partition("=")[2])
            elif re.match(r"[a-z_/]+\.[A-Z]\w+\.\w+=", code):
                found.append(code)
    assert len(found) > 2
    for binding in found:
        config.parse(
            ["gin/cappa_b16.gin"], ["DATA='here'", binding], workdir="runs/test"
        )


def test_python_examples_import_what_is_there():
    count = 0
    for page in PAGES:
        for language, block in text_and_blocks(page)[1]:
            if language != "python":
                continue
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    if node.module.split(".")[0] != "cappa_tf":
                        continue
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        name = f"{node.module}.{alias.name}"
                        assert hasattr(module, alias.name) or (
                            importlib.util.find_spec(name)
                        ), name
                        count += 1
                elif isinstance(node, ast.Attribute):
                    package, *names = ast.unparse(node).split(".")
                    if package == "cappa_tf":
                        assert names[0] in cappa_tf.__all__, names
                        count += 1
    assert count > 15


def test_the_code_layout_names_every_folder():
    _, blocks = text_and_blocks(ROOT / "docs" / "code.md")
    (tree,) = [block for _, block in blocks if "cappa_tf/\n" in block]
    folders, named = [], set()
    for line in tree.splitlines():
        names = re.match(r"\s*((?:[\w.]+(?:/|\.py) )*[\w.]+(?:/|\.py)) *", line)
        depth = (len(line) - len(line.lstrip())) // 2
        if names is None or depth > len(folders):
            continue  # It goes on with the line before.
        for name in names[1].split():
            path = "/".join([*folders[:depth], name.rstrip("/")])
            assert (ROOT / path).exists(), path
            named.add(path)
            if name.endswith("/"):
                folders = [*folders[:depth], name.rstrip("/")]
    packages = [path.parent for path in ROOT.glob("cappa_tf/**/__init__.py")]
    # Each folder of the package and of its parts, but not those below.
    wanted = {path.relative_to(ROOT).as_posix() for path in packages}
    assert {path for path in wanted if path.count("/") < 2} <= named


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^::: (.+)$", text, re.M)
    assert len(listed) == len({*listed})
    wanted = {f"{module}.{name}" for name, module in cappa_tf._PUBLIC.items()}
    assert wanted <= {*listed}


def test_every_page_is_found_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        # The reference is made from docstrings, and is a page of the site only.
        assert page.name == "api.md" or f"](docs/{page.name})" in text, page
    assert len(text.splitlines()) < 150, "It is two screens; docs/ has the rest"
    site = (ROOT / "docs" / "site" / "mkdocs.yml").read_text()
    assert all(f": {page.name}\n" in site for page in PAGES[1:])


def load(path):
    """A module of docs/site, which is not a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_first_example_says_what_it_gives():
    _, blocks = text_and_blocks(ROOT / "README.md")
    example = next(text for language, text in blocks if language == "python")
    names = {}
    exec(example, names)
    assert f'["{names["captions"][0]}", ...]' in example
    assert [*names["ranks"][0]] == ["green", "red"]


def test_the_notebook_gives_what_it_shows():
    shown = json.loads((ROOT / "docs/quickstart.ipynb").read_text())
    notebook, names = load(ROOT / "docs/site/refresh.py").run_notebook()
    assert len(notebook["cells"]) == len(shown["cells"]) > 10
    # On another machine, rounding may change what the model is unsure of.
    lines = [one["cells"][5]["outputs"][0]["text"] for one in (shown, notebook)]
    assert sum(a == b for a, b in zip(*lines, strict=True)) >= 6
    assert notebook["cells"][-2] == shown["cells"][-2]
    assert names["scores"][1].argmax() == 0
    assert [*names["ranks"][0]][0] == "green"
    accuracy = names["probe"].accuracy(names["x_test"], names["y_test"], 10.0)
    assert accuracy > 0.95
