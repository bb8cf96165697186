"""Hugging Face Hub: presets downloaded from it, and folders uploaded to it.

Needs the extra `hub`. Downloads are kept in the Hub's cache, from which they
open without a connection.
"""

from cappa_tf.utils import files

SCHEME = "hf://"
# What a preset consists of; a repository may hold other things.
_PATTERNS = ["*.json", "*.weights.h5", "assets/*", "README.md"]
_LOGIN = (
    "log in with `hf auth login`, set the environment variable HF_TOKEN, or "
    "pass `token`"
)


def download(uri, token=None):
    """Downloads a preset unless the cache has it.

    Args:
        uri: `hf://user/name` or `hf://user/name@revision`.
        token: Access token; None for that of `hf auth login` or HF_TOKEN.

    Returns:
        Path of its folder in the cache.

    Raises:
        ValueError: If there is no such repository, it is private or gated, or
            the Hub cannot be reached and the cache does not have it.
        ImportError: If huggingface_hub is not installed.
    """
    library = _library()
    repository, _, revision = uri.removeprefix(SCHEME).partition("@")
    with _errors(library, uri):
        return library.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=_PATTERNS,
            token=token,
        )


def upload(folder, uri, *, private=None, token=None, message=None):
    """Uploads a folder to a repository, which is created if missing.

    Args:
        folder: The folder.
        uri: `user/name`, with or without `hf://`.
        private: Whether a new repository is private; None for the default of
            the account.
        token: Access token; None for that of `hf auth login` or HF_TOKEN.
        message: Commit message, or None for a default.

    Returns:
        URL of the commit.

    Raises:
        ValueError: If there is no token or it does not allow this, or the Hub
            cannot be reached.
        ImportError: If huggingface_hub is not installed.
    """
    library = _library()
    repository = uri.removeprefix(SCHEME)
    if token is None and library.get_token() is None:
        raise ValueError(
            f"Uploading needs an access token: {_LOGIN}. Received: {uri} "
            "without a token"
        )
    with _errors(library, uri), files.folder_on_disk(folder) as local:
        created = library.create_repo(
            repository, exist_ok=True, private=private, token=token
        )
        done = library.upload_folder(
            repo_id=created.repo_id,
            folder_path=local,
            commit_message=message,
            token=token,
        )
    return done.commit_url


def _library():
    try:
        import huggingface_hub
        import huggingface_hub.errors  # The package imports it when asked for.
    except ImportError as error:
        raise ImportError(
            "Presets on the Hugging Face Hub need huggingface_hub: pip install "
            "'cappa-tf[hub]'"
        ) from error
    return huggingface_hub


class _errors:
    """Context that turns errors of huggingface_hub into a ValueError."""

    def __init__(self, library, uri):
        self._errors, self._uri = library.errors, uri

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or not isinstance(error, Exception):
            return
        reason = self._reason(error)
        if reason is not None:
            first = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{reason} Received: {self._uri} "
                f"({type(error).__name__}: {first})"
            ) from error

    def _reason(self, error):
        """The rule in words, or None for an error of another kind."""
        known = self._errors
        status = getattr(getattr(error, "response", None), "status_code", None)
        # Kinds before the ones that they are a kind of.
        if isinstance(error, known.HFValidationError):
            return "A preset on the Hub is named hf://user/name."
        if isinstance(error, known.GatedRepoError):
            return (
                "The owner of a gated repository grants access on its page; "
                f"then {_LOGIN}."
            )
        if isinstance(error, known.RevisionNotFoundError):
            return "The repository has no such revision."
        if isinstance(error, known.RepositoryNotFoundError):
            return (
                "There must be such a repository, and a private one needs an "
                f"access token: {_LOGIN}."
            )
        if status in (401, 403):
            return (
                "The Hub refused this access token, which must allow it: "
                f"{_LOGIN}."
            )
        if isinstance(error, known.LocalEntryNotFoundError):
            return (
                "The Hub cannot be reached (or HF_HUB_OFFLINE is set), and "
                "the cache does not have the whole preset."
            )
        if isinstance(error, known.LocalTokenNotFoundError):
            return f"An access token is missing: {_LOGIN}."
        if isinstance(error, OSError):
            return "The Hub cannot be reached or refused the request."
        return None
