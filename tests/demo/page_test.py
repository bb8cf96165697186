"""The page in headless Chromium: images in, captions read from it."""

import chromium
import keras
import pytest
import scoring
from conftest import shared_data
from demo_client import png, running

from cappa_tf.demo.answers import ModelAnswers
from cappa_tf.presets import Pretrained

STATUS = "document.getElementById('status').textContent"
WORDS = "[...document.querySelectorAll('.word span')].map(x => x.textContent)"
HEAT = "document.querySelector('.heat')"
ERRORS = "[...document.querySelectorAll('.error')].map(x => x.textContent)"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    keras.utils.set_random_seed(0)
    return Pretrained(scoring.tiny_predictor(vocabulary, batch_size=1))


@pytest.fixture(scope="module")
def url(pretrained, tmp_path_factory):
    chromium.executable()  # Skips before a model is served.
    example = tmp_path_factory.mktemp("examples") / "a red circle.png"
    example.write_bytes(png())
    answers = ModelAnswers(pretrained)
    with running(answers, examples=[example]) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser(url):
    with chromium.Browser() as browser:
        yield browser


@pytest.fixture
def page(browser, url):
    page = browser.open(url)
    page.wait_for(f"{STATUS}.startsWith('Choose an image')")
    return page


def answers(page):
    """Waits until all images are answered; returns what the page says."""
    return page.wait_for(f"{STATUS}.startsWith('Done') && {STATUS}")


def test_a_real_photo_is_captioned(page, pretrained, url):
    photos = sorted(shared_data("flickr8k_originals").glob("*.jpg"))[:1]
    page.choose_files("#files", photos)
    assert answers(page) == "Done: 1 image.", page.evaluate(ERRORS)
    (caption,) = pretrained.caption(photos)
    assert page.evaluate(WORDS) == caption.split()
    label = "document.querySelector('.words').getAttribute('aria-label')"
    assert page.evaluate(label) == f"Caption: {caption}"
    shown = "document.querySelector('.photo').naturalWidth > 100"
    assert page.evaluate(shown)
    assert page.complaints() == []
    # To its own server only, besides what it has in memory.
    others = [x for x in page.requested() if not x.startswith(url)]
    assert all(x.startswith(("data:", f"blob:{url}")) for x in others)
    page.resize(390, 844, mobile=True)
    wide = "document.documentElement.scrollWidth <= innerWidth"
    assert page.wait_for(wide)


def test_it_works_by_keyboard(page, pretrained, tmp_path):
    """From word to word, each with its map, and back to the image alone."""
    images = map(png, range(100))
    long = next(x for x in images if " " in pretrained.caption([x])[0])
    (tmp_path / "a.png").write_bytes(long)
    page.choose_files("#files", [tmp_path / "a.png"])
    answers(page)
    page.evaluate("document.querySelector('.remove').focus()")
    page.press("Tab")
    active = "document.activeElement.getAttribute('aria-label')"
    words = page.evaluate(WORDS)
    assert page.evaluate(active).startswith(f"{words[0]}, ")
    first = page.evaluate(f"!{HEAT}.hidden && {HEAT}.src")
    assert first.startswith("data:image/png")
    page.press("ArrowRight")
    assert page.evaluate(active).startswith(f"{words[1]}, ")
    second = page.evaluate(f"{HEAT}.src")
    assert second.startswith("data:image/png")
    page.press("Enter")  # It stays when the focus moves on.
    pressed = "document.activeElement.getAttribute('aria-pressed')"
    assert page.evaluate(pressed) == "true"
    page.evaluate("document.activeElement.blur()")
    assert page.evaluate(f"{HEAT}.src") == second
    page.evaluate("document.querySelectorAll('.word')[1].focus()")
    page.press("Escape")
    assert page.evaluate(f"{HEAT}.hidden")


def test_every_control_has_a_name(page):
    controls = "[...document.querySelectorAll('input, select, textarea')]"
    nameless = f"{controls}.filter(x => !x.labels.length).map(x => x.id)"
    assert page.evaluate(nameless) == []
    status = "document.getElementById('status').getAttribute('aria-live')"
    assert page.evaluate(status) == "polite"


def test_a_bad_file_has_its_message_beside_good_ones(page, tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff no image")
    page.evaluate("document.getElementById('labels').value = 'red\\nblue\\n'")
    page.choose_files("#files", [tmp_path / "bad.jpg", tmp_path / "good.png"])
    assert answers(page) == "Done: 2 images; 1 image without an answer."
    error = "document.querySelector('.card .error').textContent"
    assert "cannot be decoded" in page.evaluate(error)
    rows = "[...document.querySelectorAll('th')].map(x => x.textContent)"
    assert {*page.evaluate(rows)} == {"red", "blue"}


def test_examples_are_captioned_at_a_click(page):
    page.evaluate("document.getElementById('examples').click()")
    assert answers(page) == "Done: 1 image."
    name = "document.querySelector('.card h2').textContent"
    assert page.evaluate(name) == "a red circle.png"
