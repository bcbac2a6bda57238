"""Find a Hugging Face hub model: in the cache of huggingface_hub if it is whole there, else download it.

One short request says whether the hub can be reached and what the repository holds; only the files that
are needed are downloaded. Loading then goes on with a folder, like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from actlas.core.errors import FailureError, ModelError, did_you_mean
from actlas.models.pretrained import PROCESSOR, TOKENIZER, WEIGHTS, lacking_weights
from actlas.models.quiet import one_line

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SMALL = re.compile(r"[^/]*\.(json|jinja|txt|model|spm)")
_TIMEOUT = 10.0  # seconds; transformers alone would retry for half a minute


def looks_like_hub_name(name: str) -> bool:
    """Whether a string can be `model` or `owner/model`."""
    return _NAME.fullmatch(name) is not None and not name.endswith((".gguf", ".safetensors", ".bin"))


def hub_folder(name: str, *, offline: bool, code: bool, valid: Iterable[str]) -> Path:
    """Return a folder with a hub model's config, weights and tokenizer.

    Args:
        name: `model` or `owner/model`.
        offline: use only the cache.
        code: get the repository's Python files too.
        valid: the bundled names, for a suggestion.

    Raises:
        ModelError: no such model, or not in the cache and the hub cannot be asked.
        FailureError: the download broke off.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if (cached / "config.json").is_file() and lacking_weights(cached) is None:
            return cached
    except (LocalEntryNotFoundError, RepositoryNotFoundError, OSError):
        pass
    bundled = list(valid)
    hint = did_you_mean(name.rsplit("/", 1)[-1].lower(), bundled) or f"; bundled are {', '.join(bundled)}"
    nowhere = f"{name!r} is no bundled model and no file or folder here"
    if offline or constants.HF_HUB_OFFLINE:
        raise ModelError(f"{nowhere}, the hub's cache does not have it, and the hub may not be asked{hint}")
    try:
        info = HfApi().model_info(name, timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{nowhere}, and the hub has no such model (or it is private){hint}") from error
    except HfHubHTTPError as error:
        raise FailureError(f"the hub fails to describe {name}: {one_line(error)}; try again later") from error
    except Exception as error:  # the network library has its own errors, and it changes with versions
        said = one_line(error, 80)
        raise ModelError(f"{nowhere}, and the hub cannot be reached ({said}){hint}") from error
    wanted = _wanted([entry.rfilename for entry in info.siblings or ()], code)
    try:
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=wanted))
    except Exception as error:
        said = one_line(error, 120)
        raise FailureError(f"the download of {name} broke off ({said}); run it again to go on") from error


def _wanted(files: list[str], code: bool) -> list[str]:
    """Small files of the top folder, and one form of the weights."""
    chosen = [file for file in files if _SMALL.fullmatch(file) or file in (*TOKENIZER, *PROCESSOR)]
    form = next((weights for weights in WEIGHTS if weights in files), None)
    if form is not None:
        stem, ending = form.removesuffix(".index.json").rsplit(".", 1)
        shard = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.{ending}")
        chosen += [form] if form == f"{stem}.{ending}" else [file for file in files if shard.fullmatch(file)]
    if code:
        chosen += [file for file in files if file.endswith(".py")]
    return sorted(set(chosen))
