"""A trained model in strings: any kind of image, none of them fatal."""

import io
import warnings

import numpy as np
import pytest
import scoring
from PIL import Image

import cappa_tf
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.classifier import Classifier
from cappa_tf.models.sampling import BeamSearch
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.presets import BadImageWarning, Pretrained

TEXTS = ["red circle", "blue square", "green left"]
ORIENTATION = 274


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def captioner(vocabulary):
    predictor = scoring.tiny_predictor(vocabulary, batch_size=3)
    predictor.model.tokenizer = predictor.tokenizer  # As `Predictor.open` does.
    return Pretrained(predictor)


@pytest.fixture(scope="module")
def contrastive(vocabulary):
    return Pretrained(scoring.contrastive_predictor(vocabulary, batch_size=2))


@pytest.fixture(scope="module")
def classifier():
    sizes = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    encoder = VisionEncoder(patch_size=8, image_size=16, **sizes)
    model = Classifier(encoder, 3)
    model.build()
    predictor = Predictor(model, None, ImagePreprocessing(16))
    return Pretrained(predictor, {"classes": ["ant", "bee", "cat"]})


def pixels(height=20, width=30, seed=0):
    random = np.random.RandomState(seed)
    return random.randint(256, size=(height, width, 3)).astype("uint8")


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


def test_one_image_in_every_form_is_one_image(captioner, tmp_path):
    image = Image.fromarray(pixels())
    image.save(tmp_path / "a.png")
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        encoded(image),
        encoded(image, "TIFF"),  # Pillow decodes it.
        image,
        pixels(),
    ]
    found = quietly(captioner.embed, forms)
    assert found.shape == (6, 16) and found.dtype == np.float32
    np.testing.assert_allclose(found, found[:1].repeat(6, 0), atol=1e-6)
    assert len({*captioner.caption(forms)}) == 1


def test_gray_transparent_and_turned_images(captioner):
    gray, seen = pixels()[..., 0], np.full((20, 30, 1), 255, "uint8")
    rgb = np.repeat(gray[..., None], 3, 2)
    clear = np.concatenate([pixels(), 0 * seen], 2)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = encoded(Image.fromarray(pixels()), "PNG", exif=exif)
    exif[ORIENTATION] = 42  # Unknown: as it is.
    odd = encoded(Image.fromarray(pixels()), "PNG", exif=exif)
    pairs = [
        (odd, pixels()),
        (Image.open(io.BytesIO(odd)), pixels()),
        (gray, rgb),
        (gray[..., None], rgb),
        (np.concatenate([pixels(), seen], 2), pixels()),
        (clear, np.full((20, 30, 3), 255, "uint8")),
        (Image.open(io.BytesIO(turned)), turned),
        (turned, np.rot90(pixels(), -1)),
    ]
    for one, other in pairs:
        np.testing.assert_allclose(
            *quietly(captioner.embed, [one, other]), atol=1e-6
        )


BAD = {
    "no image": (b"no image", "image cannot be decoded"),
    "empty": (b"", "image cannot be decoded"),
    "missing": ("/nowhere/a.jpg", "image missing"),
    "numbers": (Image.new("F", (9, 9)), "image of 32-bit numbers"),
    "channels": (np.zeros((9, 9, 2), "uint8"), r"array of shape \(9, 9, 2\)"),
    "none": (np.zeros((0, 9, 3), "uint8"), r"array of shape \(0, 9, 3\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_flagged(captioner, kind):
    image, reason = BAD[kind]
    images = [pixels(), image, pixels(), image, pixels()]
    with pytest.warns(BadImageWarning, match=f"2 of 5 .*{reason}") as caught:
        found = captioner.embed(images)
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2, 4]]).all()
    assert [*caught[0].message.reasons] == [1, 3]
    assert caught[0].filename == __file__


def test_huge_images_are_flagged(vocabulary):
    """By the limit of the model's preprocessing."""
    one = scoring.tiny_predictor(vocabulary)
    small = ImagePreprocessing(16, max_pixels=100)
    model = Pretrained(Predictor(one.model, one.tokenizer, small))
    huge = [pixels(), Image.new("L", (9, 99))]
    huge.append(encoded(huge[1], "TIFF"))
    with pytest.warns(BadImageWarning) as caught:
        found = model.embed([*huge, pixels(9, 9)])
    assert set(caught[0].message.reasons.values()) == {
        "image of more than 100 pixels"
    }
    assert np.isfinite(found).all(1).tolist() == [False] * 3 + [True]


def test_all_images_bad(captioner):
    with pytest.warns(BadImageWarning):
        assert captioner.caption([b"", b""]) == [None, None]
    with pytest.warns(BadImageWarning):
        assert captioner.score([b""], TEXTS).shape == (1, 3)
    with pytest.warns(BadImageWarning):
        assert captioner.embed([b""]).shape == (1, 16)
    assert captioner.caption([]) == []
    assert captioner.embed([]).shape == (0, 16)


def test_of_an_animation_the_first_frame_of_a_file(captioner):
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "blue")]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    opened = Image.open(io.BytesIO(file))
    opened.seek(1)
    found = quietly(captioner.embed, [file, frames[0], opened, frames[1]])
    np.testing.assert_allclose(found[0], found[1], atol=1e-2)
    np.testing.assert_allclose(found[2], found[3], atol=1e-2)
    assert np.abs(found[0] - found[2]).max() > 0.05


def test_captions_are_those_of_the_predictor(captioner):
    """Whatever the batches: 7 images in batches of 3."""
    images = [pixels(seed=seed) for seed in range(7)]
    predictor = captioner.predictor
    read = predictor.preprocessing.read_pillow
    wanted = []
    for image in images:
        wanted += predictor.captions(read(Image.fromarray(image))[None])
    assert captioner.caption(images) == wanted
    assert captioner.caption(images[:1]) == wanted[:1]


def test_options_of_captions(captioner):
    images = [pixels(), pixels(seed=1)]
    for text in captioner.caption(
        images, sampler=BeamSearch(2), prefix="blue", max_length=4
    ):
        assert text.startswith("blue") and len(text.split()) <= 4
    with pytest.raises(TypeError, match="colour"):
        captioner.caption(images, colour=1)
    with pytest.raises(ValueError, match="trained without prompts"):
        captioner.caption(images, prompt="caption:")
    with pytest.raises(ValueError, match="1 for 2 images"):
        captioner.caption(images, prompt=["caption:"])


def test_scores_are_those_of_the_predictor(captioner, contrastive):
    images = [pixels(seed=seed) for seed in range(5)]
    for model in (captioner, contrastive):
        one = model.predictor
        found = quietly(model.score, images, TEXTS)
        for image, row in zip(images, found):
            read = one.preprocessing.read_pillow(Image.fromarray(image))
            np.testing.assert_allclose(
                row, one.score(read[None], TEXTS)[0], rtol=1e-4
            )
    embedded = contrastive.embed(images, "cosine")
    np.testing.assert_allclose(
        embedded @ contrastive.embed_texts(TEXTS).T, found, atol=1e-6
    )


def test_labels_are_ranked_best_first(captioner, classifier):
    images = [pixels(), pixels(seed=1)]
    labels = ["red", "green", "blue circle"]
    scores = captioner.score(images, [f"left {x}" for x in labels])
    found = captioner.classify(images, labels, ["left {}"])
    for row, ranked in zip(scores, found):
        assert [*ranked] == [labels[i] for i in np.argsort(-row)]
        np.testing.assert_allclose(sorted(row), sorted(ranked.values()))
    read = classifier.predictor.preprocessing.read_pillow
    stacked = np.stack([read(Image.fromarray(image)) for image in images])
    wanted = classifier.predictor.class_probabilities(stacked)
    for row, ranked in zip(wanted, classifier.classify(images)):
        assert sum(ranked.values()) == pytest.approx(1)
        assert ranked == pytest.approx(dict(zip(["ant", "bee", "cat"], row)))
    (named,) = classifier.classify(images[:1], ["a", "b", "c"])
    assert {*named} == {*"abc"}


def test_what_a_model_cannot_do_is_an_error(captioner, classifier, contrastive):
    image = [pixels()]
    with pytest.raises(ValueError, match="Captioning needs .*: generate"):
        contrastive.caption(image)
    with pytest.raises(ValueError, match="Scoring texts needs"):
        classifier.score(image, TEXTS)
    with pytest.raises(ValueError, match="needs .*: cosine"):
        captioner.embed(image, "cosine")
    with pytest.raises(ValueError, match="names of its 3 classes"):
        classifier.classify(image, ["a", "b"])


@pytest.mark.parametrize(
    "images",
    ["a.jpg", b"jpeg", Image.new("L", (9, 9)), np.zeros((9, 9, 3), "uint8")],
)
def test_a_single_image_is_not_taken_apart(captioner, images):
    with pytest.raises(ValueError, match="a list of images, also if"):
        captioner.embed(images)


@pytest.mark.parametrize(
    "image", [None, 3, np.zeros((9, 9, 3), "float32"), ["a.jpg"]]
)
def test_what_is_no_image_at_all_is_an_error(captioner, image):
    with pytest.raises(ValueError, match="as image 1"):
        captioner.embed([pixels(), image])


@pytest.mark.parametrize("texts", ["red", [], None, ["a", "a"], ["a", ""], [1]])
def test_texts_are_a_list(captioner, texts):
    with pytest.raises(ValueError, match="must be a list of different strings"):
        captioner.score([pixels()], texts)


def test_a_run_becomes_a_preset_with_its_card(vocabulary, tmp_path):
    run = scoring.save_run(tmp_path / "run", vocabulary)
    (run / "config.gin").write_text(
        "DATA = '/home/me/data/pets'\nBATCH_SIZE = 64\nMODEL = @x.Y\n"
    )
    (run / "results.json").write_text(
        '{"step": 2500, "exact_match": 0.9634, "confusion": [1]}'
    )
    model = cappa_tf.from_preset(run)
    model.save_to_preset(tmp_path / "p", license="apache-2.0")
    again = cappa_tf.from_preset(tmp_path / "p")
    images = [pixels(), pixels(seed=1)]
    np.testing.assert_array_equal(again.embed(images), model.embed(images))
    again.save_to_preset(tmp_path / "q")  # Facts and licence are kept.
    for folder in "pq":
        card = (tmp_path / folder / "README.md").read_text()
        assert card.startswith("---\nlicense: apache-2.0\n")
        assert "- Data: pets\n- Steps: 2,500 of 64 images (160,000" in card
        assert "| exact_match | 0.9634 |" in card
        assert "/home/me" not in card and "confusion" not in card
        assert "Images are resized to 16 x 16 pixels" in card
        assert "at most 8 tokens" in card
