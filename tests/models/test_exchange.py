"""Exported folders and files, read back by the programs that they are for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import actlas
from actlas.core.edits import Add
from actlas.core.errors import InputError, ModelError
from actlas.core.numbers import QuantSpec
from actlas.core.quant_edit import QuantEdit
from actlas.core.quant_linear import ActQuant, QuantLinear
from actlas.models.exchange import export, read_compressed
from tests.core.tiny import TEXTS, tokenizer

ACT8 = ActQuant(QuantSpec.parse("int8-token-sym"))
F8 = ActQuant(QuantSpec.parse("fp8-e4m3-token"))


def tiny() -> actlas.Model:
    """A random Llama whose layers are whole blocks of 32 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    return actlas.Model(LlamaForCausalLM(config).eval(), tokenizer(), name="tiny")


def quantised(model: actlas.Model, spec: str, **options: object) -> QuantEdit:
    layers = {n: m for n, m in model.module.named_modules() if n.endswith("_proj")}
    modules = {n: QuantLinear.of(m, spec, **options) for n, m in layers.items()}  # type: ignore[arg-type]
    gain = model.module.model.norm.weight.detach() * 1.5
    return QuantEdit(modules, {"model.norm.weight": gain}, method="rtn")


@pytest.mark.parametrize(
    ("spec", "act"),
    [("int4-g16-sym", None), ("int3-g32-sym", None), ("int4-channel-sym", None), ("int8-channel-sym", ACT8),
     ("fp8-e4m3-channel", F8), ("fp8-e4m3-channel", None), ("mxfp4", None), ("nvfp4", None), ("int2-g16-sym", ACT8)],
)  # fmt: skip
def test_transformers_loads_the_folder_and_gives_the_same_logits(
    spec: str, act: ActQuant | None, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    import transformers

    model = tiny()
    edit = quantised(model, spec, act=act)
    with model.edit(edit):
        want = model.logits(TEXTS[0])
    export(model, edit, tmp_path / "out")
    ids = model.encode(TEXTS[0])["input_ids"]
    small = spec in ("mxfp4", "nvfp4")  # the package unpacks these to bfloat16
    dtype = torch.bfloat16 if small else torch.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    with torch.no_grad():
        got = theirs(input_ids=ids).logits[0].float()
    error = float((got - want.reshape(got.shape)).norm() / want.norm())
    # the package rounds int8 inputs with max / 127.5 where Actlas takes max / 127
    assert error < (2e-2 if small or act is ACT8 else 1e-3)
    mine, codes = read_compressed(tmp_path / "out")
    with mine.edit(codes):
        torch.testing.assert_close(mine.logits(TEXTS[0]), want, rtol=1e-4, atol=1e-5)
    first = next(iter(edit.modules))
    assert torch.equal(codes.modules[first].unpacked, edit.modules[first].unpacked)  # type: ignore[union-attr]


@pytest.mark.parametrize("spec", ["int4-g16", "int3-channel", "int8-g32"])
def test_the_package_unpacks_zero_points(spec: str, tmp_path: Path) -> None:
    """transformers 5 builds these layers with unpacked zero points, so the package itself reads them here."""
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    from actlas.models.pretrained import read_config

    model = tiny()
    edit = quantised(model, spec)
    export(model, edit, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = QuantizationConfig.model_validate(read_config(tmp_path / "out")["quantization_config"])
    scheme = config.config_groups["group_0"]
    for path, layer in edit.modules.items():
        own = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
        weight = compressors.PackedQuantizationCompressor.decompress(own, scheme)["weight"]
        torch.testing.assert_close(weight, layer.weight, rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]
    mine, codes = read_compressed(tmp_path / "out")
    with model.edit(edit):
        want = model.logits(TEXTS[0])
    with mine.edit(codes):
        torch.testing.assert_close(mine.logits(TEXTS[0]), want, rtol=1e-4, atol=1e-5)


def test_plain_folder_holds_the_dequantised_weights(tmp_path: Path) -> None:
    model = tiny()
    edit = quantised(model, "nf4-channel")
    head = QuantEdit(parameters={"lm_head.weight": model.module.get_output_embeddings().weight.detach() * 2})
    with model.edit(edit, head):
        want = model.logits(TEXTS[0])
    export(model, edit + head, tmp_path / "out", "hf")
    again = actlas.load(tmp_path / "out")
    torch.testing.assert_close(again.logits(TEXTS[0]), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "tolerance"),
    [("int4-g32-float", 1e-5), ("int4-g32", 2e-3), ("int4-channel-sym", 1e-5), ("int8-channel-sym", 1e-5), ("int3-channel", 2e-3)],
)  # fmt: skip
def test_gguf_is_read_back_equal(spec: str, tolerance: float, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from gguf.quants import dequantize

    model = tiny()
    edit = quantised(model, spec)
    file = tmp_path / "m.gguf"
    model.tokenizer._tokenizer.model = _bpe(model)
    export(model, edit, file, "gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    layer = edit.modules["model.layers.1.mlp.down_proj"]
    read = torch.from_numpy(
        dequantize(tensors["blk.1.ffn_down.weight"].data, tensors["blk.1.ffn_down.weight"].tensor_type)
    )
    torch.testing.assert_close(read, layer.weight, rtol=tolerance, atol=tolerance)  # type: ignore[arg-type]
    heads = model.tower.heads  # type: ignore[union-attr]
    q = tensors["blk.0.attn_q.weight"]
    read = torch.from_numpy(dequantize(q.data, q.tensor_type))
    want = edit.modules["model.layers.0.self_attn.q_proj"].weight
    assert isinstance(want, torch.Tensor)
    permuted = want.view(heads, 2, -1, want.shape[1]).transpose(1, 2).reshape(want.shape)
    torch.testing.assert_close(read, permuted, rtol=tolerance, atol=tolerance)
    norm = torch.from_numpy(tensors["output_norm.weight"].data.copy())
    assert torch.equal(norm, edit.parameters["model.norm.weight"])


def _bpe(model: actlas.Model) -> object:
    """Make the test tokenizer a byte-level BPE, the kind that GGUF knows."""
    from tokenizers import models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = model.module.config.vocab_size
    vocabulary = {c: i for i, c in enumerate(alphabet[:size])}
    model.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return models.BPE(vocab=vocabulary, merges=[])


@pytest.mark.parametrize(
    ("spec", "options", "format", "said"),
    [
        (
            "nf4-channel",
            {},
            "compressed-tensors",
            r"cannot hold .*q_proj: its weights are nf4-channel; hf can",
        ),
        ("int4-g16", {}, "gguf", r"not whole blocks of 32; compressed-tensors and hf can"),
        ("int8-channel-sym", {"act": ACT8}, "hf", r"inputs are rounded .*; compressed-tensors can"),
        (
            "int8-channel-sym",
            {"act": ACT8, "rotate": 16},
            "gguf",
            r"an online rotation; keep it as an Actlas edit",
        ),
        ("int4-g16", {}, "onnx", r"no exchange format 'onnx'; there are compressed-tensors"),
    ],
)
def test_what_a_format_cannot_hold_is_named(
    spec: str, options: dict[str, object], format: str, said: str, tmp_path: Path
) -> None:
    model = tiny()
    with pytest.raises(InputError, match=said):
        export(model, quantised(model, spec, **options), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_edits_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    model = tiny()
    d = model.module.config.hidden_size
    both = quantised(model, "int4-g16") + Add("blocks.0.resid_post", torch.ones(d))
    with pytest.raises(InputError, match=r"Add at .* is not about weights"):
        export(model, both, tmp_path / "out")


def test_folders_that_are_not_compressed_are_refused(tmp_path: Path) -> None:
    model = tiny()
    export(model, quantised(model, "int4-g16"), tmp_path / "plain", "hf")
    with pytest.raises(ModelError, match="no compressed-tensors folder"):
        read_compressed(tmp_path / "plain")
