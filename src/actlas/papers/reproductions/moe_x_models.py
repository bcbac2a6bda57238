"""Byte-level GPT-2s at equal active width (dense, Switch, MoE-X), and what is known of each byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actlas.core.model import Model
from actlas.nn import MixtureOfExperts, MoEX, SwitchMoE, balance_loss
from actlas.papers.reproductions.byte_models import CONTEXT, byte_tokenizer, train_checkpoints
from actlas.training.upcycle import upcycle

EXPERTS, TOP_K, BALANCE = 8, 2, 0.01
#: variant -> (kind of MLP, activation)
VARIANTS = {
    "dense": ("", "gelu_new"),
    "dense ReLU": ("", "relu"),
    "Switch": ("switch", "gelu_new"),
    "ReLU experts only": ("switch", "relu"),
    "router only": ("moe-x", "gelu_new"),
    "MoE-X": ("moe-x", "relu"),
    "MoE-X, upcycled": ("upcycled", "relu"),
}


def build(variant: str, seed: int, *, width: int, layers: int) -> Model:
    """Return an untrained model; every token runs 4 `width` neurons in each block, whatever the variant.

    All start alike: decoders as in GPT-2, encoders as `nn.Linear`. GPT-2's own start (0.02) is small beside
    Adam's steps; they move the mean of an expert's weights by many standard deviations, on which the sparsity
    router acts, and half of MoE-X's neurons die at once.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    kind, activation = VARIANTS[variant]
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256,
        n_embd=width,
        n_layer=layers,
        n_head=4,
        n_inner=4 * width,
        n_positions=2 * CONTEXT,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    module: Any = GPT2LMHeadModel(config)
    module.loss_type = "ForCausalLM"  # transformers finds it from the class's name, but not from this one's
    for block in module.transformer.h:
        encoder, decoder = block.mlp.c_fc.weight, block.mlp.c_proj.weight
        if kind in ("switch", "moe-x"):
            cls = MoEX if kind == "moe-x" else SwitchMoE
            block.mlp = cls(width, 4 * width // TOP_K, EXPERTS, TOP_K, activation=activation, bias=True)
            encoder, decoder = block.mlp.w_enc, block.mlp.w_dec
        with torch.no_grad():
            encoder.normal_(0, (3 * width) ** -0.5)
            decoder.normal_(0, 0.02 / (2 * layers) ** 0.5)
    return Model(module, byte_tokenizer(), name=f"byte GPT-2 ({variant})")


def train(variant: str, text: str, seed: int, steps: int, *, width: int, layers: int) -> Model:
    """Train a variant for so many steps; an upcycled one spends the first half as a dense ReLU model."""
    if VARIANTS[variant][0] != "upcycled":
        return _train(build(variant, seed, width=width, layers=layers), text, seed, steps)
    dense = _train(build("dense ReLU", seed, width=width, layers=layers), text, seed, steps // 2)
    edit = upcycle(dense, "moe-x", split="partition", experts=EXPERTS, top_k=TOP_K, noise=0.05, seed=seed)
    return _train(edit.bake(dense), text, seed + 1, steps - steps // 2)


def _train(model: Model, text: str, seed: int, steps: int) -> Model:
    mixed = any(isinstance(m, MixtureOfExperts) for m in model.module.modules())
    penalty = (lambda module: BALANCE * balance_loss(module)) if mixed else None
    run = train_checkpoints(
        text, activation="", checkpoints=(steps,), seed=seed, model=model, penalty=penalty
    )
    return list(run)[-1][1]


def mixtures(model: Model) -> list[MixtureOfExperts]:
    """Return the mixtures of a model, block by block."""
    return [m for m in model.module.modules() if isinstance(m, MixtureOfExperts)]


def inputs_of(model: Model, texts: Sequence[bytes], block: int) -> Tensor:
    """Return what a block's MLP reads, `[bytes, width]`, for windows of equal length."""
    ids = torch.tensor([list(byte_ids(t)) for t in texts])
    return model.trace({"input_ids": ids}, f"blocks.{block}.mlp_norm").rows(f"blocks.{block}.mlp_norm")


def features_of(model: Model, x: Tensor, block: int) -> Tensor:
    """Return the neurons' values after the activation, `[bytes, neurons]`; a mixture's without its gates."""
    mlp: nn.Module = model.block(block).mlp  # type: ignore[assignment]
    with torch.no_grad():
        if isinstance(mlp, MixtureOfExperts):
            return mlp.features(x)
        values: Tensor = mlp.act(mlp.c_fc(x))  # type: ignore[operator]
        return values


def all_experts(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    """Return the neurons' values as if every expert ran at every byte, `[bytes, neurons]`."""
    with torch.no_grad():
        return torch.cat([mixture.neurons(x, j) for j in range(mixture.experts)], 1)


def byte_ids(text: bytes) -> list[int]:
    """Return the token of each byte."""
    table = _token_of_byte()
    return [table[b] for b in text]


def _token_of_byte() -> list[int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = bytes_to_unicode()
    return [byte_tokenizer().convert_tokens_to_ids(names[b]) for b in range(256)]


def windows(
    texts: Sequence[str], count: int, seed: int, size: int = CONTEXT
) -> tuple[list[bytes], dict[str, Any], Any]:
    """Draw windows of bytes from texts.

    Returns:
        The windows; for each property which of their bytes have it; the text of each byte, as a number.
    """
    raw = [t.encode() for t in texts]
    places = [(i, s) for i, r in enumerate(raw) for s in range(0, len(r) - size + 1, size)]
    generator = np.random.default_rng(seed)
    drawn = [places[i] for i in sorted(generator.permutation(len(places))[:count])]
    known = [byte_properties(r) for r in raw]
    truths = {name: np.concatenate([known[i][name][s : s + size] for i, s in drawn]) for name in known[0]}
    return [raw[i][s : s + size] for i, s in drawn], truths, np.repeat([i for i, _ in drawn], size)


def byte_properties(text: bytes) -> dict[str, Any]:
    """Return what is true of each byte, bool arrays by name.

    Everything but the last letter of a word can be known from the bytes so far; that one has to be
    predicted. Quotes are double ones and end with their paragraph.
    """
    characters = np.frombuffer(text, dtype=np.uint8)
    letter = ((characters | 32) >= ord("a")) & ((characters | 32) <= ord("z"))
    place = np.zeros(len(text), dtype=int)
    inside = np.zeros(len(text), dtype=bool)
    run, quoted = 0, False
    for i, is_letter in enumerate(letter):
        run = run + 1 if is_letter else 0
        place[i] = run
        if text[i : i + 2] == b"\n\n" or text[i : i + 3] == "\N{LEFT DOUBLE QUOTATION MARK}".encode():
            quoted = text[i] != 10
        elif text[i] == ord('"'):
            quoted = not quoted
        elif text[max(0, i - 2) : i + 1] == "\N{RIGHT DOUBLE QUOTATION MARK}".encode():
            quoted = False
        inside[i] = quoted
    following = np.append(letter[1:], False)
    return {
        "vowel": np.isin(characters | 32, list(b"aeiou")) & letter,
        "capital": letter & (characters < ord("a")),
        "digit": (characters >= ord("0")) & (characters <= ord("9")),
        "space": np.isin(characters, list(b" \n\t")),
        "punctuation": np.isin(characters, list(b".,;:!?'\"()-")),
        "inside quotes": inside,
        "first letter of a word": place == 1,
        "second letter of a word": place == 2,
        "third letter of a word": place == 3,
        "sixth letter or later": place >= 6,
        "last letter of a word": letter & ~following,
    }
