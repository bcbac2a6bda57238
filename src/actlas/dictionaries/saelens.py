"""SAELens folders: read them as Actlas dictionaries, and write Actlas dictionaries as SAELens reads them.

    sae = load_saelens("gemma-scope/layer_12/width_16k", model)      # cfg.json + sae_weights.safetensors
    save_saelens(sae, "for-saelens/")                                # SAE.load_from_disk("for-saelens/")

Both directions keep codes and reconstructions. Layout differs (SAELens stores the encoder `[d_in, d_sae]`),
and what Actlas holds apart is folded into the weights:

    W_enc' = s W_enc^T      W_dec' = W_dec / s      b_dec' = b_dec / s        s: the scale of inputs

| SAELens | Actlas | |
| --- | --- | --- |
| `standard` | `ReluSAE` | |
| `topk` | `TopKSAE` (and `GradientSAE`, written) | decoder norms folded where TopK counts them |
| `jumprelu` | `JumpReluSAE`; `BatchTopKSAE` and `MatryoshkaSAE`, written with their one threshold | |
| `batchtopk`, `matryoshka_batchtopk` | `BatchTopKSAE`, `MatryoshkaSAE` | training checkpoints, read only |
| `gated` | `GatedSAE` | |
| `transcoder`, `jumprelu_transcoder` | `Transcoder` | |
| `skip_transcoder`, `jumprelu_skip_transcoder` | `SkipTranscoder` | |

Hook names (`blocks.15.hook_resid_post`) become sites and back. Folders of SAELens before version 6 are read
too. A folder is data: JSON and safetensors are parsed, nothing in it is executed.

Inputs that SAELens normalises token by token (`layer_norm`, `constant_norm_rescale`) cannot be folded, and
are refused. `expected_average_only_in` without the factor is refused unless the factor is given.
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actlas.core.artifact import write_folder
from actlas.core.dictionary import Dictionary
from actlas.core.errors import ArtifactError, InputError, ShapeError, did_you_mean
from actlas.dictionaries.batch_topk import BatchTopKSAE
from actlas.dictionaries.gated import GatedSAE
from actlas.dictionaries.jumprelu import JumpReluSAE
from actlas.dictionaries.matryoshka import MatryoshkaSAE
from actlas.dictionaries.relu import ReluSAE
from actlas.dictionaries.sae import SAE
from actlas.dictionaries.saelens_folder import (
    CONFIG,
    FORMAT,
    TENSORS,
    WEIGHTS,
    hook_of,
    input_scale_of,
    integer,
    read_config,
    read_tensors,
    site_of,
)
from actlas.dictionaries.topk import TopKSAE
from actlas.dictionaries.transcoder import SkipTranscoder, Transcoder

if TYPE_CHECKING:
    from actlas.core.model import Model


def load_saelens(folder: str | Path, model: Model | None = None, *, input_scale: float | None = None) -> SAE:
    """Read a SAELens folder.

    Args:
        folder: holds `cfg.json` and `sae_weights.safetensors`.
        model: the model that it reads; sets the site's whole name, its heads and the fingerprint.
        input_scale: the factor of `expected_average_only_in` normalisation, where it is not folded in.

    Returns:
        A dictionary whose codes and reconstructions are those of SAELens.

    Raises:
        ArtifactError: not such a folder, an unknown architecture, or tensors that do not fit.
        InputError: normalisation that cannot be folded, or a model without that site or width.
    """
    folder = Path(folder)
    config = read_config(folder)
    name = config["architecture"]
    if not isinstance(name, str) or name not in TENSORS:
        hint = did_you_mean(str(name), TENSORS)
        raise ArtifactError(
            f"{folder} holds a SAELens dictionary of architecture {name!r}, which Actlas cannot read{hint}; "
            f"it reads {', '.join(TENSORS)}"
        )
    held = read_tensors(folder, config)
    scale = input_scale_of(folder, config, input_scale)
    transcoder = name.endswith("transcoder")
    given: dict[str, Any] = {
        "site": site_of(config),
        "W_enc": held["W_enc"].T.contiguous(),
        "b_enc": held["b_gate"] if name == "gated" else held["b_enc"],
        "W_dec": held["W_dec"],
        "b_dec": held["b_dec"],
        "scale": scale,
        "centred": bool(config.get("apply_b_dec_to_input", True)) and not transcoder,
    }
    if config.get("rescale_acts_by_decoder_norm"):
        norms = given["W_dec"].norm(dim=1)
        given["W_enc"] = given["W_enc"] * norms[:, None]
        given["b_enc"], given["W_dec"] = given["b_enc"] * norms, given["W_dec"] / norms[:, None]
    try:
        sae = _build(name, given, held, config)
    except (TypeError, ValueError) as error:  # also InputError: a k above the width, ...
        raise ArtifactError(f"{folder} does not fit together: {error}") from error
    sae.check()
    return sae if model is None else _for_model(sae, model, folder)


def save_saelens(lens: Dictionary, folder: str | Path, *, model_name: str = "") -> Path:
    """Write a dictionary as a SAELens folder.

    Args:
        lens: one of the kinds in the table above.
        folder: must not exist, be empty, or hold a SAELens folder, which is replaced.
        model_name: the model's name, for SAELens' metadata.

    Returns:
        The folder.

    Raises:
        InputError: a kind that SAELens has not got, or a folder with other files.
        FailureError: it cannot be written.
    """
    from safetensors.torch import save

    if not isinstance(lens, SAE):
        raise InputError(
            f"SAELens has no dictionary like a {type(lens).__name__}; autoencoders can be written"
        )
    name, extra = _parts(lens)
    s = lens.scale
    written = s if not isinstance(lens, Transcoder) else s * float(lens.target_scale)
    tensors = {
        "W_enc": s * lens.W_enc.T,
        "b_gate" if name == "gated" else "b_enc": lens.b_enc,
        "W_dec": lens.W_dec / written,
        "b_dec": lens.b_dec / written,
        **extra,
    }
    d_out, d_in = len(lens.b_dec), lens.channels
    config: dict[str, Any] = {
        "architecture": name,
        "d_in": d_in,
        "d_sae": lens.features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": lens.centred,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if lens.site.endswith(".attn.z") else "none",
        "metadata": {
            "sae_lens_version": FORMAT,
            "sae_lens_training_version": None,
            "model_name": model_name or None,
            "hook_name": hook_of(lens.site),
            "actlas": {"architecture": lens.architecture, **_own(lens)},
        },
    }
    if isinstance(lens, Transcoder):
        config["d_out"] = d_out
        config["metadata"]["hook_name_out"] = hook_of(lens.target) if lens.target else None
    if isinstance(lens, TopKSAE) and name == "topk":
        config |= {"k": lens.k, "rescale_acts_by_decoder_norm": False}
    plain = {key: t.detach().to("cpu", torch.float32).contiguous().clone() for key, t in tensors.items()}
    files: dict[str, str | bytes] = {WEIGHTS: save(plain), CONFIG: json.dumps(config, indent=1) + "\n"}
    return write_folder(folder, files, marker=CONFIG)


def is_saelens(folder: str | Path) -> bool:
    """Whether a folder looks like one of SAELens."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / WEIGHTS).is_file()


def _build(name: str, given: dict[str, Any], held: dict[str, Tensor], config: dict[str, Any]) -> SAE:
    own = config["metadata"].get("actlas") or {}
    given |= {
        key: own[key] for key in ("skip_above", "trained_rows") if isinstance(own.get(key), (int, float))
    }
    if name.endswith("transcoder"):
        given |= {"target": site_of(config, "hook_name_out"), "threshold": held.get("threshold")}
        return SkipTranscoder(**given, W_skip=held["W_skip"]) if "W_skip" in held else Transcoder(**given)
    if name == "standard":
        return ReluSAE(**given)
    if name == "gated":
        return GatedSAE(**given, r_mag=held["r_mag"], b_mag=held["b_mag"])
    if name == "topk":
        return TopKSAE(**given, k=integer(config, "k"))
    one = held.get("topk_threshold", held.get("threshold"))
    assert one is not None
    levels = own.get("levels", config.get("matryoshka_widths"))
    kind = {"batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka"}.get(name, own.get("architecture"))
    if kind in ("batchtopk", "matryoshka") and bool((one == one.flatten()[0]).all()):
        given |= {
            "threshold": one.flatten()[:1].clone(),
            "k": max(1, round(float(own.get("k", config.get("k", 1))))),
        }
        if kind == "batchtopk":
            return BatchTopKSAE(**given)
        full = tuple(sorted({*(int(n) for n in levels or ()), len(given["b_enc"])}))
        return MatryoshkaSAE(**given, levels=full)
    tiny = torch.finfo(torch.float32).tiny  # a threshold of 0 or less is a ReLU: what is positive passes
    return JumpReluSAE(**given, log_threshold=one.clamp_min(tiny).log())


def _parts(lens: SAE) -> tuple[str, dict[str, Tensor]]:
    """Return SAELens' name of a kind, and the tensors that it has beside the base's."""
    if isinstance(lens, Transcoder):
        if lens.k is not None:
            raise InputError("SAELens has no TopK transcoder; it has ReLU and JumpReLU ones")
        extra = {} if lens.threshold is None else {"threshold": lens.threshold}
        skip = isinstance(lens, SkipTranscoder)
        if isinstance(lens, SkipTranscoder):
            extra["W_skip"] = lens.W_skip
        return f"{'jumprelu_' if 'threshold' in extra else ''}{'skip_' if skip else ''}transcoder", extra
    if isinstance(lens, GatedSAE):
        return "gated", {"r_mag": lens.r_mag, "b_mag": lens.b_mag}
    if isinstance(lens, JumpReluSAE):
        return "jumprelu", {"threshold": lens.threshold}
    if isinstance(lens, BatchTopKSAE):
        return "jumprelu", {"threshold": lens.threshold.expand(lens.features)}
    if isinstance(lens, TopKSAE):
        return "topk", {}
    if isinstance(lens, ReluSAE):
        return "standard", {}
    raise InputError(f"SAELens has no dictionary like a {type(lens).__name__}; it has {', '.join(TENSORS)}")


def _own(lens: SAE) -> dict[str, Any]:
    """Return what only Actlas needs to get the same kind back."""
    names = {f.name for f in fields(lens)}
    return {n: getattr(lens, n) for n in ("k", "levels", "skip_above", "trained_rows") if n in names}


def _for_model(sae: SAE, model: Model, folder: Path) -> SAE:
    names = {"site": sae.site} | (
        {"target": sae.target} if isinstance(sae, Transcoder) and sae.target else {}
    )
    sizes = {"site": sae.channels, "target": len(sae.b_dec)}
    changed: dict[str, Any] = {"fingerprint": model.fingerprint}
    for which, name in names.items():
        found = model.resolve(name)[0]
        size = None if found.features is None else torch.Size(found.features).numel()
        if size is not None and size != sizes[which]:
            raise ShapeError(
                f"{folder} has {sizes[which]} channels at {found.name}, where {model.name} has {size}; it "
                "is of another model"
            )
        changed[which] = found.name
        if which == "site" and found.features is not None and len(found.features) == 2:
            changed["heads"] = found.features[0]
    return replace(sae, **changed)
