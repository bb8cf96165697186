"""The configuration: every mistake stops the run and is named in the error."""

import sys
import textwrap
import types

import gin
import keras
import pytest

from cappa_tf import config
from cappa_tf.utils import files

ROOT = "stand_ins.root"


class Layer(keras.layers.Layer):
    """Accepts any keyword as far as gin can see, like every Keras class."""

    def __init__(self, width=8, ratio=0.5, size: int | str = 4, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.ratio = ratio
        self.size = size


class Reader:
    def __init__(self, path, split="train", flip=False):
        self.path, self.split, self.flip = path, split, flip


class Rate:
    def __init__(self, steps=1):
        self.steps = steps


class Slope(Rate):
    def __init__(self, steps=1, end=0.0):
        super().__init__(steps)
        self.end = end


CALLS = []


def prepare(path, pieces=3):
    CALLS.append((path, pieces))


def root(layer, data, eval_data, rate, steps, workdir, prepare=None, hook=None):
    """Stands in for the trainer: builds, records the configuration, reads."""
    model = layer()
    config.save_config(workdir)
    if prepare is not None:
        prepare()
    config.save_operative_config(workdir, 1)
    return {
        "model": model,
        "data": data,
        "eval_data": eval_data,
        "rate": rate,
        "steps": steps,
        "hook": hook,
    }


GIN = """
    from __gin__ import dynamic_registration
    import stand_ins

    WORKDIR = %gin.REQUIRED
    DATA = %gin.REQUIRED
    STEPS = 10
    WIDTH = 16
    RATE = @stand_ins.Rate()

    stand_ins.root:
        layer = @stand_ins.Layer
        data = @train/stand_ins.Reader()
        eval_data = @eval/stand_ins.Reader()
        rate = %RATE
        steps = %STEPS
        workdir = %WORKDIR
        prepare = @stand_ins.prepare
    stand_ins.Layer.width = %WIDTH
    stand_ins.Reader.path = %DATA
    train/stand_ins.Reader.flip = True
    eval/stand_ins.Reader.split = 'heldout'
    stand_ins.Rate.steps = %STEPS
    stand_ins.prepare.path = %DATA
"""


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch):
    module = types.ModuleType("stand_ins")
    for part in (Layer, Reader, Rate, Slope, prepare, root):
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, "stand_ins", module)
    CALLS.clear()


@pytest.fixture(name="write")
def _write(tmp_path):
    def write(text, name="run.gin"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def parse(gin_files, params=("DATA='here'",), workdir="somewhere"):
    config.parse(gin_files, params, workdir=workdir, root=ROOT)


def test_run_builds_what_the_files_say(write, tmp_path):
    parse([write(GIN)], ["DATA='here'", "STEPS=12"], tmp_path)
    result = config.run(ROOT, hook="given")
    assert result["model"].width == 16
    assert (result["data"].flip, result["data"].split) == (True, "train")
    assert result["eval_data"].split == "heldout"
    assert result["data"].path == result["eval_data"].path == "here"
    assert result["steps"] == result["rate"].steps == 12
    assert result["hook"] == "given"
    assert CALLS == [("here", 3)]
    # What gin builds is the plain class: Keras reads its signature.
    assert type(result["model"]) is Layer


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("STPES = 3", ["STPES", "Did you mean STEPS"]),
        ("stand_ins.Layer.widht = 3", ["Layer", "widht", "width"]),
        ("stand_ins.Reader.splt = 'a'", ["Reader", "splt", "line"]),
        ("stand_ins.Raeder.split = 'a'", ["Raeder"]),
        ("tran/stand_ins.Reader.flip = True", ["tran/stand_ins.Reader", "did"]),
        ("stand_ins.Slope.end = 0.5", ["stand_ins.Slope", "end"]),
        ("STEPS = %gin.REQUIRED", ["STEPS", "must be set"]),
        ("STEPS = %LATER", ["LATER", "STEPS", "is missing"]),
        ("WIDTH = '16'", ["WIDTH", "Layer.width", "an integer", "'16'"]),
        ("WIDTH = 1e3", ["WIDTH", "an integer", "1000.0"]),
        ("WIDTH = True", ["WIDTH", "an integer", "True"]),
        ("stand_ins.Layer.ratio = '3e-4'", ["Layer.ratio", "a number", "3e-4"]),
        ("stand_ins.Layer.size = 1.5", ["Layer.size", "int | str", "1.5"]),
        ("train/stand_ins.Reader.flip = 1", ["Reader.flip", "True or False"]),
        ("eval/stand_ins.Reader.split = 3", ["Reader.split", "a string"]),
        ("stand_ins.root.rate = @stand_ins.Rated()", ["Rated"]),
        ("stand_ins.root.rate = 3e--4", ["line"]),
    ],
)
def test_a_mistake_in_a_file_is_named(write, line, named):
    with pytest.raises(config.ConfigError) as error:
        parse([write(GIN), write(_header(line), "other.gin")])
    for word in named:
        assert word.lower() in str(error.value).lower()


def _header(line):
    start = "from __gin__ import dynamic_registration\nimport stand_ins\n"
    return start + line


@pytest.mark.parametrize(
    ("param", "named"),
    [
        ("STPES=3", "STPES"),
        ("STEPS", "NAME=VALUE"),
        ("DATA=/my/data", "quotes"),
        ("WIDTH='3'", "WIDTH"),
        ("Layer.widht=3", "widht"),
        ("Lyaer.width=3", "Lyaer"),
        ("Slope.end=0.5", "Slope"),
        ("tran/Reader.flip=True", "tran/stand_ins.Reader"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(write, param, named):
    path = write(GIN + "\n    stand_ins.root.hook = @stand_ins.Slope\n")
    if "Slope" in param:  # Known to gin, but replaced.
        other = write(_header("stand_ins.root.hook = None"), "other.gin")
        files = [path, other]
    else:
        files = [path]
    with pytest.raises(config.ConfigError, match=named):
        parse(files, ["DATA='here'", param])


def test_all_that_is_missing_is_listed_at_once(write):
    with pytest.raises(config.ConfigError) as error:
        parse([write(GIN)], [], workdir=None)
    assert str(error.value).count("DATA must be set") == 1
    assert "WORKDIR must be set" in str(error.value)
    assert "--gin_param=\"DATA='...'\"" in str(error.value)


def test_an_argument_nobody_binds_is_named(write):
    with pytest.raises(config.ConfigError, match="root needs steps"):
        parse([write(GIN.replace("steps = %STEPS", "hook = %STEPS", 1))])


def test_a_later_file_may_replace_a_part(write):
    """The replaced part's own bindings are no mistake, then."""
    other = """
        from __gin__ import dynamic_registration
        import stand_ins
        RATE = @stand_ins.Slope()
        stand_ins.Slope.end = 0.25
    """
    parse([write(GIN), write(other, "other.gin")])
    rate = config.arguments(ROOT)["rate"]
    assert (type(rate), rate.end) == (Slope, 0.25)


def test_no_file_and_no_root(write):
    with pytest.raises(config.ConfigError, match="gin/quickstart.gin"):
        parse([])
    with pytest.raises(config.ConfigError, match=r"absent.gin.*quickstart"):
        parse(["absent.gin"])
    with pytest.raises(config.ConfigError, match="No --gin_file binds"):
        parse([write("STEPS = 3")])


def test_both_saved_files_parse_again(write, tmp_path):
    other = write(_header("RATE = @stand_ins.Slope()"), "other.gin")
    parse([write(GIN), other], ["DATA='here'", "WIDTH=5"], tmp_path)
    config.run(ROOT)
    first = (tmp_path / "config.gin").read_text()
    for name in ("config.gin", "operative_config-1.gin"):
        parse([str(tmp_path / name)], [], workdir=None)
        result = config.run(ROOT)
        assert result["model"].width == 5
        assert result["data"].flip is True
        assert type(result["rate"]) is Slope
        if name == "config.gin":
            assert (tmp_path / "config.gin").read_text() == first
    # The operative configuration also holds the defaults.
    text = (tmp_path / "operative_config-1.gin").read_text()
    assert "stand_ins.prepare.pieces = 3" in text


def test_load_run_gives_the_arguments_of_a_moved_run(write, tmp_path):
    parse([write(GIN)], ["DATA='here'"], tmp_path / "old")
    config.run(ROOT)
    (tmp_path / "old").rename(tmp_path / "new")
    found = config.load_run(tmp_path / "new", ["DATA='there'"], root=ROOT)
    assert found["workdir"] == str(tmp_path / "new")
    assert found["layer"]().width == 16
    assert found["data"].path == "there"
    assert found["hook"] is None
    with pytest.raises(config.ConfigError, match=r"old.config\.gin"):
        config.load_run(tmp_path / "old", root=ROOT)


def test_files_and_runs_may_lie_in_a_bucket(tmp_path):
    bucket = f"ram:/{tmp_path}"
    files.write_text(f"{bucket}/sizes.gin", textwrap.dedent(GIN))
    files.write_text(f"{bucket}/run.gin", f"include '{bucket}/sizes.gin'\n")
    parse([f"{bucket}/run.gin"], ["DATA='here'"], f"{bucket}/run")
    config.run(ROOT)
    found = config.load_run(f"{bucket}/run", root=ROOT)
    assert found["workdir"] == f"{bucket}/run"
    assert found["data"].path == "here"
    with pytest.raises(config.ConfigError, match="gin_file=ram:/.*/absent"):
        parse([f"{bucket}/absent.gin"])


def test_nothing_half_written_is_left(tmp_path):
    config.save_config(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [
        "config.gin"
    ]


@pytest.mark.parametrize("include", ["quickstart", "clip_flickr8k"])
def test_a_file_of_version_0_1_0_means_what_it_did(include, tmp_path):
    """By the old places of its modules, on the command line, too."""
    path = tmp_path / "mine.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "from cappa_tf.data import pipeline\n"
        "from cappa_tf.training import optimizers\n"
        "from cappa_tf.training import trainer\n"
        f"include 'gin/{include}.gin'\n"
        "pipeline.CaptionDataset.num_readers = 3\n"
        "train/pipeline.CaptionDataset.antialias = True\n"
        "optimizers.AdamW.beta_2 = 0.5\n"
        "trainer.train.train_data = @train/pipeline.CaptionDataset()\n"
        "trainer.train.sheet_images = 7\n"
        "DATA = 'data/pipeline.txt'\n"
    )
    params = [
        "trainer.train.sample_images = 8",
        "optimizers.AdamW.epsilon=0.25",
    ]
    config.parse([str(path)], params, workdir="w")
    given = config.arguments()
    evaluation = given["evaluation"]
    assert (evaluation.sheet_images, evaluation.sample_images) == (7, 8)
    optimizer = given["optimizer"]()
    assert (optimizer.epsilon, optimizer.beta_2) == (0.25, 0.5)
    data = given["train_data"]
    assert (data.num_readers, data.preprocessing.antialias, data.path) == (
        3,
        True,
        "data/pipeline.txt",
    )


OLD_ARGUMENTS = """
trainer.train:
    # In a block, between others.
    devices = [
        'CPU:0',
    ]
    total_steps = 5
    final_weights = 'best'  # Kept.
    test_data = None
trainer.train.keep_checkpoints = %KEPT
KEPT = 7
"""


@pytest.mark.parametrize(
    "imported",
    [
        "from cappa_tf.training import trainer\n",
        "from cappa_tf.training import trainer as old  # An alias.\n",
        None,  # The names are those of the file before.
    ],
)
def test_arguments_that_became_settings_keep_their_names(imported, tmp_path):
    path = tmp_path / "mine.gin"
    text = OLD_ARGUMENTS
    if imported:
        text = "from __gin__ import dynamic_registration\n" + imported + text
        if " as old" in imported:
            text = text.replace("trainer.train", "old.train")
    path.write_text(text)
    params = ["train.eval_steps=3", "trainer.train.jit_compile=False"]
    config.parse(["gin/quickstart.gin", str(path)], params, workdir="w")
    given = config.arguments()
    assert given["settings"].total_steps == 5
    assert given["settings"].keep_checkpoints == 7
    assert given["settings"].batch_size == 64  # As the file says.
    assert given["evaluation"].final_weights == "best"
    assert given["evaluation"].eval_steps == 3
    assert given["compute"].devices == ["CPU:0"]
    assert given["compute"].jit_compile is False
    assert given["test_data"] is None


def test_a_whole_file_of_version_0_1_0_needs_no_settings(tmp_path):
    """Such as a run's config.gin, where nothing names the new objects."""
    path = tmp_path / "config.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "from cappa_tf.models import captioner\n"
        "from cappa_tf.training import optimizers\n"
        "from cappa_tf.training import trainer\n"
        "SEED = 3\n"
        "trainer.train.batch_size = 8\n"
        "trainer.train.model = @captioner.Captioner\n"
        "trainer.train.optimizer = @optimizers.AdamW\n"
        "trainer.train.precision = 'float32'\n"
        "trainer.train.seed = %SEED\n"
        "trainer.train.total_steps = 10\n"
        "trainer.train.train_data = None\n"
        "trainer.train.workdir = %WORKDIR\n"
        "WORKDIR = 'old'\n"
    )
    found = config.load_run(tmp_path)
    settings = found["settings"]
    assert (settings.total_steps, settings.batch_size) == (10, 8)
    assert settings.seed == 3
    assert found["compute"].precision == "float32"
    assert found["workdir"] == str(tmp_path)
    # It is saved by the new names.
    config.save_config(tmp_path / "again")
    text = (tmp_path / "again" / "config.gin").read_text()
    assert "settings.RunSettings.total_steps = 10" in text
    config.parse([str(tmp_path / "again" / "config.gin")])
    assert config.arguments()["settings"] == settings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trainer.train.total_stepz = 5", "(?s)total_stepz.*line 4"),
        ("trainer.train.total_steps = 1.5", "total_steps.*an integer"),
        ("trainer.train.final_weights = 'x'", "`final_weights` must be one of"),
    ],
)
def test_a_mistake_in_an_old_argument_is_named(line, message, tmp_path):
    path = tmp_path / "mine.gin"
    path.write_text(
        "from __gin__ import dynamic_registration\n"
        "from cappa_tf.training import trainer\n"
        "include 'gin/quickstart.gin'\n" + line
    )
    with pytest.raises(ValueError, match=message):
        config.parse([str(path)], workdir="w")
        config.arguments()


def test_a_size_of_version_0_1_0_is_a_captioner_of_that_size(tmp_path):
    """Included or laid over another file, when it wired the model, too."""
    path = tmp_path / "mine.gin"
    rest = "objectives/cappa data/captions optimizers/adamw runs/pretrain"
    includes = ["models/s16", *rest.split()]
    path.write_text("".join(f"include 'gin/{x}.gin'\n" for x in includes))
    for given, width in (([path], 384), ([path, "gin/models/b16.gin"], 768)):
        config.parse([*map(str, given)], ["DATA='here'"], workdir="w")
        assert f"HIDDEN_DIM = {width}" in gin.config_str()
