"""The built wheel in a fresh environment: gin files, commands."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest
from conftest import ROOT
from PIL import Image

COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "scripts"
]


PRESET_FILES = ("metadata.json", "assets/tokenizer/vocabulary.spm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of the wheel."""
    source = tmp_path_factory.mktemp("source")
    wheels = tmp_path_factory.mktemp("wheels")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("cappa_tf", "gin", "tools"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    preset = source / "cappa_tf" / "shipped" / "made_here"
    for name in PRESET_FILES:
        (preset / name).parent.mkdir(parents=True, exist_ok=True)
        (preset / name).write_text("content")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "README.md").write_text("CapPa")
    options = ["--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", wheels, source],
        check=True,
        capture_output=True,
    )
    (path,) = wheels.iterdir()
    return path


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """Runs a command of an environment that holds the wheel.

    Its dependencies are those of the environment that runs the tests, by a
    path file: what is installed there as editable is not found.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    # An egg-info of the checkout does not count as installed.
    options = ["--no-deps", "--no-index", "--ignore-installed", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install"]
        + [*options, wheel],
        check=True,
        capture_output=True,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_paths()["purelib"])

    def run(name, *arguments, cwd, succeeds=True):
        kept = ("PYTHONPATH", "PYTHONSTARTUP")
        result = subprocess.run(
            [folder / "bin" / name, *map(str, arguments)],
            cwd=cwd,
            env={k: v for k, v in os.environ.items() if k not in kept},
            capture_output=True,
            text=True,
        )
        output = result.stdout + result.stderr
        if succeeds:
            assert result.returncode == 0, output
        return output

    return run


def test_it_holds_the_gin_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    shipped = {path.relative_to(ROOT) for path in ROOT.glob("gin/**/*.gin")}
    packed = {name for name in names if name.endswith(".gin")}
    assert packed == {f"cappa_tf/{path.as_posix()}" for path in shipped}
    # Neither gin-config's own folder nor a top-level `tools`.
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"cappa_tf"}


def test_it_holds_the_presets(wheel):
    folder = ROOT / "cappa_tf" / "shipped"
    wanted = {f"made_here/{name}" for name in PRESET_FILES}
    wanted |= {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }
    prefix = "cappa_tf/shipped/"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packed = {x.removeprefix(prefix) for x in names if x.startswith(prefix)}
    assert packed == wanted


def test_it_holds_the_page_of_the_demo(wheel):
    page = {path.name for path in ROOT.glob("cappa_tf/demo/page/*")}
    prefix = "cappa_tf/demo/page/"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packed = {x.removeprefix(prefix) for x in names if x.startswith(prefix)}
    assert packed == page == {"page.html", "page.css", "page.js"}


def test_the_gin_files_are_found_from_anywhere(command, tmp_path):
    code = (
        "import pathlib, cappa_tf; from cappa_tf import config; "
        "print(config.gin_root() == pathlib.Path(cappa_tf.__file__).parent, "
        "'site-packages' in cappa_tf.__file__)"
    )
    assert command("python", "-c", code, cwd=tmp_path).strip() == "True True"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_shows_its_own_help(name, command, tmp_path):
    # absl's exit code after --help is 1.
    shown = command(name, "--help", cwd=tmp_path, succeeds=False)
    assert f"    {name} " in shown
    assert "Traceback" not in shown
    # Every flag in the help text is one of the tool's flags.
    main_flag = {
        "cappa-serving-client": "--address",
        "cappa-train": "--gin_file",
        "cappa-train-tokenizer": "--data",
        "cappa-prepare-data": "--input",
        "cappa-convert": "--input",
        "cappa-compare": "--gin_file",
    }.get(name, "--checkpoint")
    assert f"\n  {main_flag}: " in shown
    for missing in ("tools/", ".py "):
        assert missing not in shown


@pytest.mark.slow
def test_the_commands_together_from_an_empty_folder(command, tmp_path):
    """From photos to captions, without access to the checkout."""

    def run(name, *arguments):
        return command(name, *arguments, cwd=tmp_path)

    values = {
        "DATA": "scenes",
        "IMAGE_SIZE": 32,
        "BATCH_SIZE": 4,
        "TOTAL_STEPS": 3,
        "WARMUP_STEPS": 2,
        "JIT_COMPILE": False,
        "scenes.prepare.num_train": 32,
        "scenes.prepare.num_eval": 8,
    }
    params = [f"--gin_param={name}={x!r}" for name, x in values.items()]
    files = ["--gin_file=gin/quickstart.gin", "--workdir=run"]
    run("cappa-train", *files, *params)
    assert (tmp_path / "run" / "results.json").is_file()

    photos = tmp_path / "photos"
    photos.mkdir()
    for i, name in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (40, 30), name).save(photos / f"{i}.jpg")
        (photos / f"{i}.txt").write_text(f"all {name}")
    printed = run("cappa-prepare-data", "--input=photos", "--output=data")
    assert "nothing skipped" in printed
    run("cappa-train-tokenizer", "--data=data", "--vocabulary_size=20")
    assert (tmp_path / "data" / "tokenizer.model").is_file()

    model = "--checkpoint=run"
    printed = run("cappa-caption", model, "--format=jsonl", "photos")
    rows = [line for line in printed.splitlines() if line.startswith("{")]
    assert len(rows) == len(list(photos.glob("*.jpg")))
    split = "--test_split=train"
    run("cappa-evaluate", "--task=perplexity", model, "--data=data", split)
    output = "--output=encoder.keras"
    run("cappa-export", "--what=backbone", model, output)
    run("cappa-convert", "--to=big_vision", "--input=run", "--output=w.npz")
    assert (tmp_path / "encoder.keras").is_file()
    assert (tmp_path / "w.npz").is_file()
    # No server answers: the message is the client's own.
    arguments = ["--protocol=rest", "--address=localhost:9", "photos"]
    printed = command(
        "cappa-serving-client", *arguments, cwd=tmp_path, succeeds=False
    )
    assert "localhost:9" in printed
