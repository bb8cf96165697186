"""The Hub: its offline cache, its errors, and what it is called with."""

import inspect
import os
import shutil

import numpy as np
import pytest
import tiny

import cappa_tf
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.saving import hub, preset_folder

pytest.importorskip("huggingface_hub", reason="pip install '.[hub]'")
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preset") / "encoder"
    captioner = tiny.make_model(40)
    captioner.build()
    image = ImagePreprocessing(16).to_json()
    preset_folder.save(folder, captioner.vision_encoder, image)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache without a connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill(cache, preset, revision="main"):
    """Puts a preset where the library keeps its downloads."""
    repository = cache / "models--user--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    return shutil.copytree(preset, repository / "snapshots" / COMMIT)


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_the_cache_opens_without_a_connection(cache, preset, revision):
    snapshot = fill(cache, preset, revision)
    name = "hf://user/name" + ("@v2" if revision == "v2" else "")
    assert os.path.samefile(hub.download(name), snapshot)
    images = np.ones((1, 16, 16, 3), "float32")
    wanted = preset_folder.load_encoder(preset)(images)["encoded"]
    for opened in (cappa_tf.open_encoder(name), cappa_tf.load_backbone(name)):
        np.testing.assert_array_equal(opened(images)["encoded"], wanted)


def test_offline_without_it(cache):
    with pytest.raises(ValueError, match="cannot be reached .*HF_HUB_OFFLINE"):
        cappa_tf.from_preset("hf://user/name")


def test_a_cache_of_another_revision_does_not_count(cache, preset):
    fill(cache, preset)
    with pytest.raises(ValueError, match="Received: hf://user/name@v3"):
        hub.download("hf://user/name@v3")


@pytest.mark.parametrize("name", ["a/b/c", "a--b", "a/b.git", ""])
def test_malformed_names(cache, name):
    with pytest.raises(ValueError, match="is named hf://user/name. Received"):
        hub.download(f"hf://{name}")


def failure(kind, status):
    # Of the client that this version of the library uses.
    request = huggingface_hub.get_session().build_request("GET", "https://a.b")
    return kind("no", response=errors.Response(status, request=request))


@pytest.mark.parametrize(
    "kind, status, message",
    [
        (errors.RepositoryNotFoundError, 404, "private one needs .*HF_TOKEN"),
        (errors.GatedRepoError, 403, "grants access .*HF_TOKEN"),
        (errors.RevisionNotFoundError, 404, "no such revision"),
        (errors.HfHubHTTPError, 401, "refused this access token"),
        (errors.HfHubHTTPError, 503, "cannot be reached or refused"),
    ],
)
def test_errors_of_the_hub(monkeypatch, kind, status, message):
    def refuse(*args, **kwargs):
        raise failure(kind, status)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=f"{message}.* Received: hf://user/a"):
        hub.download("hf://user/a")


class Hub:
    """Stands in for the calls; refuses what the library and the Hub refuse."""

    def __init__(self, monkeypatch, token="secret", allowed=("user",)):
        self.token, self.allowed, self.files = token, allowed, {}
        self.private = {}
        for name in ("create_repo", "upload_folder", "get_token"):
            real = inspect.signature(getattr(huggingface_hub, name))
            stub = self._checked(getattr(self, name), real)
            monkeypatch.setattr(huggingface_hub, name, stub)

    def _checked(self, stub, real):
        def call(*args, **kwargs):
            bound = real.bind(*args, **kwargs)
            validate_repo_id(bound.arguments.get("repo_id"))
            if "token" in real.parameters:
                sent = bound.arguments.pop("token", None) or self.token
                if sent != "secret":
                    raise failure(errors.HfHubHTTPError, 401)
            return stub(**bound.arguments)

        return call

    def get_token(self):
        return self.token

    def create_repo(self, repo_id, exist_ok=False, private=None):
        if repo_id.split("/")[0] not in self.allowed:
            raise failure(errors.HfHubHTTPError, 403)
        if repo_id in self.files and not exist_ok:
            raise failure(errors.HfHubHTTPError, 409)
        self.files.setdefault(repo_id, {})
        self.private.setdefault(repo_id, private)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, repo_id, folder_path, commit_message=None):
        if repo_id not in self.files:
            raise failure(errors.RepositoryNotFoundError, 404)
        if not os.path.isdir(folder_path):
            raise ValueError(f"Provided path: '{folder_path}' is not a folder")
        for above, _, names in os.walk(folder_path):
            for name in names:
                path = os.path.join(above, name)
                inside = os.path.relpath(path, folder_path)
                with open(path, "rb") as file:
                    self.files[repo_id][inside] = file.read()
        return huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}",
            commit_message=commit_message or "Upload folder",
            commit_description="",
            oid=COMMIT,
        )


def test_pushing(monkeypatch, preset):
    there = Hub(monkeypatch)
    model = cappa_tf.from_preset(preset)
    url = model.push_to_hub("user/name", private=True, license="mit")
    assert url == f"https://huggingface.co/user/name/commit/{COMMIT}"
    names = {"config.json", "metadata.json", "model.weights.h5", "README.md"}
    assert names < there.files["user/name"].keys()
    assert there.private["user/name"] is True
    # The Hub reads the header of the card.
    card = huggingface_hub.ModelCard(
        there.files["user/name"]["README.md"].decode()
    )
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "image-feature-extraction"
    model.push_to_hub("hf://user/name")  # Again.


def test_pushing_without_a_token(monkeypatch, preset):
    there = Hub(monkeypatch, token=None)
    with pytest.raises(ValueError, match="needs an access token: .*HF_TOKEN"):
        hub.upload(preset, "user/name")
    hub.upload(preset, "user/name", token="secret")
    assert there.files["user/name"]
    with pytest.raises(ValueError, match="refused this access token"):
        hub.upload(preset, "user/name", token="guess")


def test_pushing_to_others(monkeypatch, preset):
    Hub(monkeypatch)
    with pytest.raises(ValueError, match="must allow it.*other/name"):
        hub.upload(preset, "other/name")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(hub.__builtins__, "__import__", _no_hub(__import__))
    with pytest.raises(ImportError, match=r"pip install 'cappa-tf\[hub\]'"):
        hub.download("hf://user/name")


def _no_hub(real):
    def find(name, *args, **kwargs):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    return find
