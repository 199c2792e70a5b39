"""Published folders on the Hugging Face Hub, `hub:USER/NAME`. Requires `difftori[hub]`."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from difftori.errors import CheckpointError, ConfigError, MissingExtraError, brief

PREFIX = "hub:"


def hub_name(address: str | Path) -> str | None:
    """Return USER/NAME of `hub:USER/NAME`, or None for a path. Raises ConfigError for an invalid name."""
    text = str(address)
    if not text.startswith(PREFIX):
        return None
    name = text.removeprefix(PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ConfigError([f"{text!r} is not a repository of the Hub. Fix: write hub:USER/NAME"])
    return name


def download(name: str, files: Sequence[str], *, revision: str | None = None) -> Path:
    """Download these files of a model repository into the Hub's cache, and return their folder.

    `revision`: a branch, tag or commit (default: the repository's main branch). Raises CheckpointError if that fails.
    """
    hub = library()
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{PREFIX}{name}: cannot be downloaded ({brief(error)}). Fix: check the name, the revision and the network; a private "
            "repository needs `hf auth login`"
        ) from error


def upload(folder: Path, name: str, files: Sequence[str], *, private: bool) -> str:
    """Upload these files of a folder to a model repository, which is created if it does not exist. Returns the commit's address.

    Files of an earlier upload that the folder lacks are deleted. Raises ConfigError if the repository is public although `private`
    was requested, before anything is uploaded, and CheckpointError if the upload fails.
    """
    hub = library()
    api = hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise ConfigError(
                [
                    f"private: {PREFIX}{name} exists and is public. Fix: make it private on the Hub, or choose another name"
                ]
            )
        commit = api.upload_folder(
            repo_id=name,
            folder_path=str(folder),
            allow_patterns=list(files),
            delete_patterns=list(files),
            commit_message="difftori publish",
        )
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(
            f"{PREFIX}{name}: cannot be uploaded ({brief(error)}). Fix: log in with `hf auth login` as a user who may write there, "
            "and check the network"
        ) from error
    return str(commit)


def library() -> ModuleType:
    """Return `huggingface_hub`. Raises MissingExtraError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingExtraError(
            "the Hugging Face Hub needs huggingface_hub. Fix: pip install 'difftori[hub]'"
        ) from error
    return huggingface_hub
