"""SAELens folders: written and read without the library, and both ways against the library itself where it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor

from actlas.core.errors import ArtifactError, InputError, NonFiniteError, ShapeError
from actlas.core.model import Model
from actlas.dictionaries.baselines import KMeansDictionary
from actlas.dictionaries.crosscoder import Crosscoder
from actlas.dictionaries.sae import SAE, architecture
from actlas.dictionaries.saelens import is_saelens, load_saelens, save_saelens
from actlas.dictionaries.saelens_folder import hook_of, site_of

SITE, HOOK = "blocks.1.resid_post", "blocks.1.hook_resid_post"
#: Kind -> options; all have a scale, biases and (where they are not centred) inputs that are not.
KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "topk": {"k": 4},
    "gradient": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka": {"k": 4, "levels": (10, 40)},
    "jumprelu": {"threshold": 0.5},
    "gated": {},
    "transcoder": {"d_out": 20, "target": "blocks.1.mlp.out"},
    "skip-transcoder": {"d_out": 20, "target": "blocks.1.mlp.out"},
}


def made(kind: str, d: int = 16, seed: int = 0, **more: Any) -> SAE:
    """Return an autoencoder of a kind with random numbers in every tensor."""
    sae = architecture(kind).create(SITE, d, 40, seed=seed, **KINDS[kind], **more)
    g = torch.Generator().manual_seed(seed + 1)
    changed: dict[str, Any] = {
        name: t + 0.2 * torch.randn(t.shape, generator=g)
        for name, t in sae._tensors().items()
        if name not in ("W_dec", "threshold", "target_scale")
    }
    if "threshold" in sae._tensors():
        changed["threshold"] = torch.tensor([0.7])
    if kind.endswith("transcoder"):
        changed["target_scale"] = torch.tensor([0.4])
    return replace(sae, **changed, scale=1.7, skip_above=55.0, trained_rows=1000)


def rows(d: int = 16) -> Tensor:
    return 2 * torch.randn(60, d, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", list(KINDS))
def test_written_and_read_again(kind: str, tmp_path: Path) -> None:
    sae, x = made(kind), rows()
    folder = save_saelens(sae, tmp_path / "sae", model_name="toy")
    again = load_saelens(folder)
    same = {"gradient": "topk"}.get(kind, kind)
    assert again.architecture == same and again.site == SITE
    assert again.skip_above == 55.0 and again.trained_rows == 1000 and again.scale == 1.0
    torch.testing.assert_close(again.encode(x).dense(), sae.encode(x).dense(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.reconstruct(x), sae.reconstruct(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again.atoms, sae.atoms)
    assert sorted(p.name for p in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    config = json.loads((folder / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == HOOK and config["metadata"]["model_name"] == "toy"
    save_saelens(made(kind, seed=3), folder)  # a SAELens folder is replaced
    assert not torch.equal(load_saelens(folder).W_enc, again.W_enc)


# -- against the library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_saelens_reads_what_actlas_writes(kind: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sae_lens")
    sae, x = made(kind), rows()
    theirs = library.SAE.load_from_disk(save_saelens(sae, tmp_path / "sae", model_name="toy"))
    with torch.no_grad():
        codes = theirs.encode(x)
        torch.testing.assert_close(theirs.forward(x), sae.reconstruct(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codes, sae.encode(x).dense(), atol=1e-5, rtol=1e-5)
    assert theirs.cfg.metadata.hook_name == HOOK
    assert 0 < float((codes > 0).sum(1).float().mean()) < 30


def theirs_of(library: Any, name: str, d: int = 16, **options: Any) -> Any:
    """Return one of the library's autoencoders with random numbers in every tensor."""
    kinds = {
        "standard": library.StandardSAE, "topk": library.TopKSAE, "jumprelu": library.JumpReLUSAE,
        "gated": library.GatedSAE, "transcoder": library.Transcoder, "skip_transcoder": library.SkipTranscoder,
        "jumprelu_transcoder": library.JumpReLUTranscoder,
        "jumprelu_skip_transcoder": library.JumpReLUSkipTranscoder,
    }  # fmt: skip
    cls = kinds[name]
    config_class = getattr(library, f"{cls.__name__}Config")
    if name.endswith("transcoder"):
        options |= {"d_out": 20, "apply_b_dec_to_input": False}
    config = config_class(d_in=d, d_sae=40, **options)
    config.metadata.hook_name = HOOK
    config.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    out = cls(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in out.named_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
            if key == "threshold":
                p.abs_()
                p[:3] = torch.tensor([0.0, -1.0, 0.4])
    return out


@pytest.mark.parametrize(
    "name, options",
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {"k": 5}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
        ("gated", {}),
        ("transcoder", {}),
        ("skip_transcoder", {}),
        ("jumprelu_transcoder", {}),
        ("jumprelu_skip_transcoder", {}),
    ],
)
def test_actlas_reads_what_saelens_writes(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    library = pytest.importorskip("sae_lens")
    theirs, x = theirs_of(library, name, **options), rows()
    theirs.save_model(tmp_path)
    sae = load_saelens(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x).dense(), theirs.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.reconstruct(x), theirs.forward(x), atol=1e-5, rtol=1e-5)
    assert sae.site == SITE
    if name.endswith("transcoder"):
        assert sae.target == "blocks.1.mlp.out"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [True, False])
def test_actlas_reads_training_checkpoints(name: str, rescale: bool, tmp_path: Path) -> None:
    library = pytest.importorskip("sae_lens")
    kinds = {"batchtopk": "BatchTopKTrainingSAE", "matryoshka_batchtopk": "MatryoshkaBatchTopKTrainingSAE"}
    more = {"matryoshka_widths": [10, 40]} if name.startswith("m") else {}
    config = getattr(library, kinds[name] + "Config")(
        d_in=16, d_sae=40, k=4.0, rescale_acts_by_decoder_norm=rescale, **more
    )
    trained = getattr(library, kinds[name])(config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
        trained.topk_threshold = torch.tensor(0.45, dtype=torch.float64)
    trained.save_model(tmp_path / "training")
    trained.save_inference_model(tmp_path / "inference")
    inference, x = library.SAE.load_from_disk(tmp_path / "inference"), rows()
    sae = load_saelens(tmp_path / "training")
    assert sae.architecture == {"batchtopk": "batchtopk"}.get(name, "matryoshka")
    with torch.no_grad():
        torch.testing.assert_close(sae.reconstruct(x), inference.forward(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            load_saelens(tmp_path / "inference").reconstruct(x), inference(x), atol=1e-5, rtol=1e-5
        )


def test_scaled_inputs_are_folded(tmp_path: Path) -> None:
    library = pytest.importorskip("sae_lens")
    theirs, x = theirs_of(library, "standard", normalize_activations="expected_average_only_in"), rows()
    theirs.save_model(tmp_path)
    with pytest.raises(InputError, match="give it as input_scale"):
        load_saelens(tmp_path)
    sae = load_saelens(tmp_path, input_scale=0.3)
    theirs.fold_activation_norm_scaling_factor(0.3)
    with torch.no_grad():
        torch.testing.assert_close(sae.reconstruct(x), theirs.forward(x), atol=1e-5, rtol=1e-5)


def test_heads_are_joined_as_saelens_joins_them(tmp_path: Path) -> None:
    library = pytest.importorskip("sae_lens")
    sae = replace(made("relu"), site="blocks.1.attn.z")
    theirs = library.SAE.load_from_disk(save_saelens(sae, tmp_path / "sae"))
    x = rows().reshape(60, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward(x).flatten(1), sae.reconstruct(x), atol=1e-5, rtol=1e-5)


# -- sites, models, folders --------------------------------------------------------------------------------


def test_names() -> None:
    names = {
        "blocks.15.hook_resid_post": "blocks.15.resid_post",
        "blocks.3.attn.hook_z": "blocks.3.attn.z",
        "blocks.0.ln2.hook_normalized": "blocks.0.mlp_norm",
        "blocks.7.mlp.hook_post": "blocks.7.mlp.act",
        "ln_final.hook_normalized": "final_norm",
        "some.other.name": "some.other.name",
    }
    for hook, site in names.items():
        assert site_of({"metadata": {"hook_name": hook}}) == site and hook_of(site) == hook
    assert (
        site_of({"metadata": {"hook_name": "blocks.3.attn.hook_z", "hook_head_index": 0}})
        == "blocks.3.attn.z[head=0]"
    )
    assert site_of({"metadata": {}}) == "unknown" and site_of({"metadata": {}}, "hook_name_out") == ""


def test_on_a_model(toy: Model, tmp_path: Path) -> None:
    folder = save_saelens(made("topk", d=32), tmp_path / "sae")
    sae = load_saelens(folder, toy)
    assert sae.fingerprint == toy.fingerprint
    with toy.edit(sae.substitute()):
        toy.logits("w1 w2 w3")
    z = replace(made("topk", d=32), site="blocks.1.attn.z")
    joined = load_saelens(save_saelens(z, tmp_path / "z"), toy)
    assert joined.heads == 4
    with toy.edit(joined.edit(3, 2.0)):
        toy.logits("w1 w2 w3")
    with pytest.raises(ShapeError, match="has 16 channels at blocks.1.resid_post, where toy has 32"):
        load_saelens(save_saelens(made("topk"), tmp_path / "narrow"), toy)


def test_folders_of_older_versions(tmp_path: Path) -> None:
    sae = made("topk")
    folder = save_saelens(sae, tmp_path / "sae")
    old = {
        "d_in": 16, "d_sae": 40, "dtype": "float32", "hook_point": HOOK, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4}, "normalize_activations": False, "apply_b_dec_to_input": True,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(old))
    held = load((folder / "sae_weights.safetensors").read_bytes()) | {"scaling_factor": torch.ones(40)}
    save_file(held, folder / "sae_weights.safetensors")
    again = load_saelens(folder)
    assert again.architecture == "topk" and again.site == SITE
    torch.testing.assert_close(again.reconstruct(rows()), sae.reconstruct(rows()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change, error, said",
    [
        ({"architecture": "temporal"}, ArtifactError, "architecture 'temporal', which Actlas cannot read"),
        ({"architecture": ["topk"]}, ArtifactError, "which Actlas cannot read"),
        ({"normalize_activations": "layer_norm"}, InputError, "'layer_norm', which cannot be folded"),
        ({"d_sae": 41}, ArtifactError, r"cfg.json says \[.*41"),
        ({"d_sae": -3}, ArtifactError, "d_sae = -3; it must be a positive whole number"),
        ({"d_in": None}, ArtifactError, "d_in = None"),
        ({"k": 99}, ArtifactError, "k is 99; it must be between 1 and the width, 40"),
        ({"k": float("inf")}, ArtifactError, "k = inf"),
        ({"metadata": [1]}, ArtifactError, "metadata that is not a JSON object"),
        ({"architecture": "jumprelu"}, ArtifactError, "lacks the tensor 'threshold'"),
        ({"activation_fn_str": "tanh-relu"}, ArtifactError, "activation function 'tanh-relu'"),
    ],
)
def test_bad_configurations(
    change: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    folder = save_saelens(made("topk"), tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text()) | change
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(error, match=said) as caught:
        load_saelens(folder)
    assert "\n" not in str(caught.value)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it has no cfg.json"):
        load_saelens(tmp_path)
    folder = save_saelens(made("topk"), tmp_path / "sae")
    assert is_saelens(folder) and not is_saelens(tmp_path)
    weights = folder / "sae_weights.safetensors"
    whole, held = weights.read_bytes(), load(weights.read_bytes())
    for text in ("{", "[1]", "null"):
        (tmp_path / "cfg").mkdir(exist_ok=True)
        (tmp_path / "cfg" / "cfg.json").write_text(text)
        (tmp_path / "cfg" / "sae_weights.safetensors").write_bytes(whole)
        with pytest.raises(ArtifactError, match="not readable JSON|must hold a JSON object"):
            load_saelens(tmp_path / "cfg")
    weights.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        load_saelens(folder)
    weights.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        load_saelens(folder)
    save_file(held | {"surprise": torch.zeros(2)}, weights)
    with pytest.raises(ArtifactError, match="holds the tensor 'surprise'"):
        load_saelens(folder)
    held["b_enc"][3] = float("nan")
    save_file(held, weights)
    with pytest.raises(NonFiniteError, match="b_enc holds values that are NaN"):
        load_saelens(folder)


def test_kinds_that_saelens_has_not_got(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SAELens has no TopK transcoder"):
        save_saelens(architecture("transcoder").create("s", 8, 16, k=2), tmp_path / "a")
    with pytest.raises(InputError, match="SAELens has no dictionary like a Crosscoder"):
        save_saelens(Crosscoder.create("a, b", 8, 16), tmp_path / "b")
    with pytest.raises(InputError, match="SAELens has no dictionary like a KMeansDictionary"):
        save_saelens(KMeansDictionary(site="s", centroids=torch.ones(2, 3)), tmp_path / "c")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(InputError, match="give another name or remove it"):
        save_saelens(made("topk"), tmp_path / "mine")
