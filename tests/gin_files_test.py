"""Every shipped gin file parses and builds the model it describes.

The files are found by a glob, so that new ones are tested, too.
"""

import json
import pathlib

import gin
import keras
import labelled
import pytest

from cappa_tf import config
from cappa_tf.models.sizes import variant
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.training.linear_probe import SweepSettings

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNNABLE = sorted(f"gin/{path.name}" for path in ROOT.glob("gin/*.gin"))
SIZES = sorted(f"gin/sizes/{path.name}" for path in ROOT.glob("gin/sizes/*"))
TRANSFER = sorted(
    path.relative_to(ROOT).as_posix() for path in ROOT.glob("gin/transfer/*")
)
PARTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("gin/*/*.gin")
    # They are not parts of a training run, or have roots of their own.
    if path.parent.name not in ("transfer", "studies")
)
PROBES = ["gin/transfer/linear_probe.gin", "gin/transfer/map_probe.gin"]
PAPER = [path for path in RUNNABLE if path.startswith("gin/cap")]

# Parameters that a file requires.
GIVEN = ("DATA='here'",)
GIVEN_FOR = {
    "gin/data/folder.gin": ("TOKENIZER='here'",),
    "gin/data/img2dataset.gin": ("TOKENIZER='here'",),
    "gin/data/mixture.gin": ("WEB_DATA='{split}-*.tar'",),
    "gin/data/tfds.gin": ("TOKENIZER='here'",),
    "gin/data/webdataset.gin": ("TOKENIZER='here'",),
    "gin/lit_b16.gin": ("ENCODER='there'",),
    "gin/clip_jax_l16.gin": ("WEIGHTS='there'",),
}

# Objectives of each kind of model other than a captioner.
OBJECTIVES = {
    "gin/models/contrastive.gin": ("clip", "siglip"),
    "gin/models/contrastive_captioner.gin": ("cappa_clip",),
    "gin/models/bag_of_tokens.gin": ("superclass",),
}

# At 224 px, 64 tokens, vocabulary 32,000: counted from the public JAX code.
COUNTS = {
    "gin/sizes/s16.gin": 60_461_312,
    "gin/sizes/m16.gin": 96_333_056,
    "gin/sizes/b16.gin": 191_669_504,
    "gin/sizes/l14.gin": 570_176_768,
}
VARIANTS = {
    "gin/sizes/ti16.gin": ("Ti/16", 6),
    "gin/sizes/s16.gin": ("S/16", 6),
    "gin/sizes/m16.gin": ("M/16", 6),
    "gin/sizes/b16.gin": ("B/16", 6),
    "gin/sizes/l16.gin": ("L/16", 12),
    "gin/sizes/l14.gin": ("L/14", 12),
    "gin/sizes/so400m14.gin": ("So400m/14", 12),
}


def parse(*files, params=None, workdir="runs/test"):
    if params is None:
        params = (*GIVEN, *GIVEN_FOR.get(files[0], ()))
    config.parse(files, params, workdir=workdir)
    return config.arguments()


def build(constructor):
    """A model without values, as only its shapes are checked."""
    try:
        with keras.StatelessScope(initialize_variables=False):
            model = constructor()
            model.build()
            return model
    finally:
        # Keras would initialize them at the end of the next such scope.
        keras.utils.clear_session(free_memory=False)


@pytest.mark.parametrize("path", RUNNABLE)
def test_a_runnable_file_builds_parts_that_fit(path):
    found = parse(path)
    model = build(found["model"])
    optimizer = found["optimizer"]()
    assert optimizer.schedule.total_steps == found["settings"].total_steps
    for name in ("train_data", "eval_data"):
        data = found[name]
        assert data.path == "here"
        towers = (model, *model.parts.values())
        lengths = {t.max_length for t in towers if hasattr(t, "max_length")}
        assert lengths == {data.tokenizer.max_length}
        assert tuple(data.image_size) == model.vision_encoder.image_size
    assert callable(found["prepare"]) or found["prepare"] is None


def test_the_structure_of_the_public_weights():
    """Their number, without the contrastive loss' two, and special ids."""
    model = build(parse("gin/clip_jax_l16.gin")["model"])
    assert model.count_params() == 676_454_400
    assert model.vision_encoder.count_params() == 328_237_056
    special = model.text_decoder.special_tokens.get_config()
    assert special == {"start": 1, "eos": 2, "pad": 3, "mask": 4}


@pytest.mark.parametrize("path", RUNNABLE)
def test_a_runnable_file_opens_with_the_command_that_runs_it(path):
    start = (ROOT / path).read_text().split("include")[0]
    assert f"python tools/train.py --gin_file={path}" in start


@pytest.mark.parametrize("path", SIZES)
def test_a_size_file_gives_the_size_of_its_name(path):
    model = build(parse("gin/cappa_b16.gin", path)["model"])
    encoder = model.vision_encoder.get_config()
    decoder = model.text_decoder.get_config()
    for name in ("hidden_dim", "num_heads", "mlp_dim"):
        assert encoder[name] == decoder[name]
    if path in COUNTS:
        assert model.count_params() == COUNTS[path]
    if path in VARIANTS:
        name, layers = VARIANTS[path]
        sizes = variant(name)
        patch = sizes.pop("patch_size")
        assert {key: encoder[key] for key in sizes} == sizes
        assert tuple(model.vision_encoder.patch_size) == (patch, patch)
        assert decoder["num_layers"] == layers
    else:
        assert model.count_params() < 30_000_000, "large: add it to VARIANTS"


# Two towers, gap and last, as table 1 of the CapPa paper counts CLIP*: 197M and
# 640M parameters.
@pytest.mark.parametrize(
    ("path", "patch", "count"),
    [
        ("gin/clip_s16.gin", 16, 55_567_489),
        ("gin/clip_b16.gin", 16, 196_659_457),
        ("gin/clip_l16.gin", 14, 640_420_865),
    ],
)
def test_clip_has_the_papers_number_of_parameters(path, patch, count):
    found = parse(path, params=(*GIVEN, f"PATCH_SIZE={patch}"))
    assert build(found["model"]).count_params() == count


@pytest.mark.parametrize("path", PARTS)
def test_a_part_may_be_laid_over_a_runnable_file(path):
    given = (*GIVEN, *GIVEN_FOR.get(path, ()))
    files = [path]
    for model, names in OBJECTIVES.items():
        objectives = [f"gin/objectives/{name}.gin" for name in names]
        if path == model or path in objectives:
            files = [model, path if path in objectives else objectives[0]]
    found = parse("gin/cappa_b16.gin", *files, params=given)
    # What a part names is built, and opens nothing.
    assert found["train_data"].tokenizer.max_length == 64


def test_lit_trains_a_text_tower_against_a_frozen_encoder():
    found = parse("gin/lit_b16.gin")
    weights = found["weights"]
    assert weights.initialize_from == "there"
    assert weights.initialize_parts == weights.frozen_parts
    model = build(found["model"])
    model.freeze(weights.frozen_parts)
    assert found["features"].features is None
    # The text tower, its projection and the temperature.
    trained = sum(v.shape.num_elements() for v in model.trainable_variables)
    text = model.text_encoder.count_params()
    assert trained == text + 768 * 768 + 768 + 1
    assert model.embedding_width == 768


@pytest.fixture(name="probed", scope="module")
def _probed(tmp_path_factory):
    """Bindings of a small encoder, and of data that names three classes."""
    folder = tmp_path_factory.mktemp("probed")
    labelled.keras_model(pool=False).save(folder / "encoder.keras")
    names = {"classes": ["a", "b", "c"]}
    data = labelled.write(folder / "data", {"train": [0, 1, 2]}, **names)
    return (f"ENCODER={str(folder / 'encoder.keras')!r}", f"DATA={data!r}")


def test_the_map_probe_fits_encoder_and_data(probed):
    found = parse("gin/transfer/map_probe.gin", params=probed)
    model = found["model"]()
    model.build()
    weights = found["weights"]
    model.freeze(weights.frozen_parts, weights.trained_parts)
    assert found["features"].features == "cached"
    model.use_features()
    assert model.feature_kind == "encoded"
    assert model.num_classes == 3
    pool = model.vision_encoder.pooling_weights()
    trained = sum(v.shape.num_elements() for v in model.trainable_variables)
    assert trained == sum(v.size for v in pool) + 8 * 3 + 3
    for split in ("train", "eval", "test"):
        data = found[f"{split}_data"]
        assert tuple(data.image_size) == model.vision_encoder.image_size
        assert data.tokenizer is None


def test_the_linear_probe_is_a_root_of_its_own(probed):
    found = parse("gin/transfer/linear_probe.gin", params=probed)
    assert tuple(found["vision_encoder"]().image_size) == (16, 16)
    assert found["sweep"].settings() == SweepSettings().settings()
    assert found["eval_split"] is None
    # What is for the other root is not read.
    with pytest.raises(config.ConfigError, match="TOTAL_STEPS is set, but"):
        parse(
            "gin/transfer/linear_probe.gin", params=(*probed, "TOTAL_STEPS=9")
        )


@pytest.mark.parametrize("path", PROBES)
def test_a_probe_saves_what_parses_again(path, probed, tmp_path):
    parse(path, params=probed, workdir=str(tmp_path))
    config.save_config(tmp_path)
    first = gin.config_str()
    config.load_run(tmp_path)
    assert gin.config_str() == first


def test_the_decoder_of_several_tasks_reads_any_encoder(probed, tmp_path):
    params = (
        probed[0],
        "DATA=['here', 'there']",
        "PROMPTS=['caption:', 'answer: {question}']",
        "WEIGHTS=[3, 1]",
        "TOKENIZER='here'",
        "IMAGE_SIZE=16",
    )
    path = "gin/transfer/decoder.gin"
    found = parse(path, params=params, workdir=str(tmp_path))
    model = found["model"]()
    sizes = model.text_decoder.get_config()
    # The size B, as in the protocol.
    for name, size in variant("B/16").items():
        assert name == "patch_size" or sizes[name] == size
    assert sizes["encoder_dim"] == model.vision_encoder.hidden_dim == 8
    assert model.score_kinds == ("autoregressive", "blind")
    assert found["weights"].frozen_parts == ["vision_encoder"]
    assert found["features"].features == "cached"
    for split in ("train", "eval"):
        data = found[f"{split}_data"]
        assert data.path == "here + there"
        assert data.tokenizer.max_length == model.text_decoder.max_length
    config.save_config(tmp_path)
    first = gin.config_str()
    config.load_run(tmp_path)
    assert gin.config_str() == first


@pytest.mark.parametrize("path", PAPER)
def test_the_papers_recipe(path):
    found = parse(path)
    optimizer = found["optimizer"]()
    settings = found["settings"]
    assert (settings.total_steps, settings.batch_size) == (366_500, 8_192)
    assert optimizer.schedule.warmup_steps == 10_000
    assert optimizer.get_config()["learning_rate"] == 1e-3
    assert optimizer.get_config()["weight_decay"] == 1e-4
    assert optimizer.get_config()["global_clip_norm"] == 1.0
    model = found["model"]()
    assert model.text_decoder.vocabulary_size == 32_000
    assert model.text_decoder.max_length == 64
    assert tuple(model.vision_encoder.image_size) == (224, 224)


def test_cap_and_cappa_differ_in_the_objective_only():
    texts = []
    for name in ("cap_b16", "cappa_b16"):
        parse(f"gin/{name}.gin")
        texts.append(gin.config_str().splitlines())
    first, second = (set(text) for text in texts)
    assert first - second == {"MASKED_PRED_PROB = 0.0"}
    assert second - first == {"MASKED_PRED_PROB = 0.75"}


# LiT differs in more: it begins with a trained encoder.
@pytest.mark.parametrize(
    "path",
    [p for p in RUNNABLE if p.endswith("_b16.gin") and "lit" not in p],
)
def test_objectives_share_everything_else(path):
    """Same encoder, data, optimizer and trainer: a comparison."""

    def recipe(path):
        found = parse(path)
        encoder = found.pop("model")().vision_encoder.get_config()
        del encoder["name"]
        optimizer = found.pop("optimizer")().get_config()
        data = [
            {
                k: v
                for k, v in vars(found.pop(name)).items()
                if isinstance(v, str | int | float | tuple | None)
            }
            for name in ("train_data", "eval_data")
        ]
        return found, encoder, optimizer, data

    assert recipe(path) == recipe("gin/cappa_b16.gin")


@pytest.mark.parametrize("path", PAPER)
def test_without_data_it_says_which_binding_to_set(path):
    with pytest.raises(config.ConfigError) as error:
        parse(path, params=())
    assert "DATA must be set" in str(error.value)


@pytest.mark.parametrize(
    ("param", "named"),
    [
        ("BATCHSIZE=8", "BATCHSIZE.*Did you mean BATCH_SIZE"),
        ("VisionEncoder.num_layer=8", "num_layer.*num_layers"),
        ("Captioner.masking_rate=0.5", "masking_rate.*masking_ratio"),
        ("TOTAL_STEPS=1e3", "TOTAL_STEPS.*must be an integer.*1000.0"),
        ("TOTAL_STEPS='9'", "TOTAL_STEPS.*must be an integer.*'9'"),
        ("LEARNING_RATE='3e-4'", "LEARNING_RATE.*must be a number.*'3e-4'"),
        ("DETERMINISTIC='no'", "DETERMINISTIC.*must be True or False"),
        ("MASKED_PRED_PROB='x'", "MASKED_PRED_PROB.*must be a number"),
        ("CaptionDataset.captions_per_image=1.5", "captions_per_image"),
        ("IMAGE_SIZE='224'", "IMAGE_SIZE.*'224'"),
        ("DATA=3", "DATA.*Received: 3"),
        ("WORKDIR=3", "WORKDIR.*Received: 3"),
        ("AdamW.beta_1=0.5", "AdamW"),
        ("MODEL=%gin.REQUIRED", "MODEL must be set"),
    ],
)
def test_a_mistake_is_named_before_anything_is_built(param, named):
    workdir = None if "WORKDIR" in param else "runs/test"
    with pytest.raises(config.ConfigError, match=f"(?s){named}"):
        parse("gin/cappa_b16.gin", params=(*GIVEN, param), workdir=workdir)


@pytest.mark.parametrize("path", RUNNABLE)
def test_the_saved_configuration_parses_again(path, tmp_path):
    parse(path, workdir=str(tmp_path))
    config.save_config(tmp_path)
    first = gin.config_str()
    config.load_run(tmp_path)
    assert gin.config_str() == first


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A file of a tiny vision encoder, for transfer."""
    path = str(tmp_path_factory.mktemp("encoder") / "encoder.keras")
    model = VisionEncoder(
        8, 2, num_heads=2, mlp_dim=8, patch_size=16, image_size=32
    )
    model.build()
    model.save(path)
    return path


def parse_transfer(*files, encoder, params=()):
    given = (f"ENCODER={encoder!r}", "DATA='here'", "NUM_CLASSES=7")
    return parse(*files, params=(*given, *params))


@pytest.mark.parametrize("usual", [False, True])
def test_fine_tuning_starts_from_an_encoder_and_a_new_head(usual, encoder):
    found = parse_transfer(
        "gin/transfer/finetune.gin",
        *(["gin/transfer/adamw.gin"] if usual else []),
        encoder=encoder,
        params=("IMAGE_SIZE=64", "STOCHASTIC_DEPTH=0.2"),
    )
    model = found["model"]()
    model.build()
    assert model.vision_encoder.image_size == (64, 64)
    assert model.vision_encoder.stochastic_depth == 0.2
    assert not model.head.kernel.numpy().any()
    optimizer = found["optimizer"]()
    optimizer.build(model.trainable_variables)
    settings = found["settings"]
    assert optimizer.schedule.total_steps == settings.total_steps == 20_000
    if not usual:
        # big_vision configs/transfer.py, for ImageNet.
        assert settings.batch_size == 512
        config = optimizer.get_config()
        assert config["momentum"] == 0.9
        assert config["momentum_dtype"] == "bfloat16"
        assert config["weight_decay"] == 0.0
        assert not config["use_ema"]
        assert len(set(optimizer._rates)) == 1
    else:
        # Before the two blocks, in each, and after them.
        assert sorted({rate / 5e-4 for rate in optimizer._rates}) == (
            pytest.approx([0.75**3, 0.75**2, 0.75, 1.0])
        )
        assert model.label_smoothing == 0.1
        assert optimizer.use_ema
    for data in ("train_data", "eval_data", "test_data"):
        assert found[data].tokenizer is None
        assert found[data].image_size == (64, 64)


def test_augmentation_may_be_laid_over_fine_tuning(encoder):
    pytest.importorskip("keras_cv", reason="pip install '.[transfer]'")
    files = ("gin/transfer/finetune.gin", "gin/transfer/augmentation.gin")
    data = parse_transfer(*files, encoder=encoder)["train_data"]
    kinds = [type(one).__name__ for one in data.augmentations]
    assert kinds == ["RandAugment", "RandomCutout", "OneOf"]


@pytest.mark.parametrize("path", RUNNABLE + PARTS + TRANSFER)
def test_no_file_binds_a_name_twice(path):
    """The last binding would win silently."""
    lines = (ROOT / path).read_text().splitlines()
    names = [line.split("=")[0].strip() for line in lines if " = " in line]
    macros = [name for name in names if name.isupper()]
    assert len(macros) == len(set(macros))


def test_quickstart_runs_and_records_what_it_ran(tmp_path):
    """Two steps of a real run, with the smallest model and few images."""
    params = [
        f"DATA={str(tmp_path / 'scenes')!r}",
        "scenes.prepare.num_train=300",
        "scenes.prepare.num_eval=8",
        "TOTAL_STEPS=2",
        "WARMUP_STEPS=1",
        "BATCH_SIZE=8",
        "trainer.train.final_evaluation=False",
        "trainer.train.sample_images=0",
        "settings.EvaluationSettings.image_use_images=0",
        "EVALUATION_IMAGES=2",
    ]
    files = [
        "gin/quickstart.gin",
        "gin/sizes/tiny8.gin",
        "gin/evaluation/scenes.gin",
    ]
    config.parse(files, params, workdir=str(tmp_path / "run"))
    config.run(
        on_start=config.save_config,
        on_first_step=config.save_operative_config,
    )
    (operative,) = (tmp_path / "run").glob("operative_config-*.gin")
    found = config.load_run(tmp_path / "run")
    again = parse(str(operative), params=(), workdir=None)
    for name in ("workdir", "settings", "evaluation", "compute", "weights"):
        assert found[name] == again[name]
    sizes = [build(values["model"]).count_params() for values in (found, again)]
    assert sizes[0] == sizes[1]
    measured = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= measured["evaluation/scenes/blind/macro"] <= 1
    # The operative configuration also holds defaults.
    assert "AdamW.beta_1 = 0.9" in operative.read_text()
