"""mohd: is a wide model that uses half of its hidden dimensions for each token better than a narrow one?

Two parts. (A) The observation, on SmolLM2: few dimensions of the residual stream hold 90% of a token's
squared magnitude, and neighbouring tokens use the same ones more than strangers do. (B) Byte-level Llamas
learn prose and Python source: a narrow dense one, a mixture of hidden dimensions (MoHD) of twice the width
that uses as many of them, with equal heads and MLPs, the dense model of that width, and MoHD without each
of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actlas.core.measurement import Measurement
from actlas.core.model import Model
from actlas.measure.likelihood import Losses, nll
from actlas.measure.samples import mean_measurement
from actlas.nn import MoHD
from actlas.papers.reproduction import Check, Findings, Measured, Plot, reproduction
from actlas.papers.reproductions import byte_mixtral as texts
from actlas.papers.reproductions.byte_models import CONTEXT, byte_tokenizer, train_checkpoints

NARROW, MOHD, WIDE = "dense, narrow", "MoHD", "dense, wide"
ALONE, PLAIN, UNFUSED = "no shared slices", "no scaling", "no fusion"
ARMS = (NARROW, MOHD, WIDE, ALONE, PLAIN, UNFUSED)
SLICES, SHARED, ROUTED = 16, 4, 4
BALANCE = 1e-2
OVER = "loss over MoHD"


def judge(m: Measured) -> list[Check]:
    """Central: on SmolLM2 fewer dimensions hold 90% of a token's squared magnitude than after a random
    rotation of the same activations (interval over documents above 0), and neighbouring tokens share more
    of theirs than tokens of different documents (likewise); at equal steps and equally many active
    parameters MoHD of twice the width has a lower loss than the narrow dense model, and removing the
    shared slices does not help: each by a paired interval over documents (above 0; below 0 it fails).
    Also: the dense model of the same width has a lower loss than MoHD; leaving out the scaling, or the
    fusion, costs loss; and the router does not collapse (no routed slice is chosen for less than 1% of
    the tokens in any component).
    """
    site = {"site": "middle"}
    rarest = m.get("tokens of the rarest routed slice", arm=MOHD)
    return [
        Check.above("few dimensions hold a token's magnitude",
                    m.get("hidden-dim-usage less than rotated", **site), 0.0, central=True),
        Check.above("neighbours use the same dimensions",
                    m.get("hidden-dim-overlap of neighbours over strangers", **site), 0.0, central=True),
        Check.above("MoHD beats the narrow dense model", m.get(OVER, arm=NARROW), 0.0, central=True),
        Check.above("shared slices help", m.get(OVER, arm=ALONE), 0.0, central=True),
        Check.below("the wide dense model beats MoHD", m.get(OVER, arm=WIDE), 0.0),
        Check.above("scaling helps", m.get(OVER, arm=PLAIN), 0.0),
        Check.above("fusion helps", m.get(OVER, arm=UNFUSED), 0.0),
        Check("every routed slice is used", None if rarest is None else rarest.value >= 0.01, str(rarest)),
    ]  # fmt: skip


@reproduction(
    "mohd",
    claim="Few hidden dimensions carry a token and its neighbours share them; a model of twice the width "
    "that uses half of its dimensions for each token, some always and some by choice, beats a dense one of "
    "as many active parameters.",
    judge=judge,
    quick={"width": 48, "layers": 2, "steps": 200, "seeds": 1, "eval_tokens": 8192, "tokens": 2048,
           "arms": ARMS},
    full={"width": 192, "layers": 4, "steps": 2000, "seeds": 3, "eval_tokens": 49152, "tokens": 16384,
          "arms": ARMS},
)  # fmt: skip
def mohd(
    *,
    seed: int,
    width: int,
    layers: int,
    steps: int,
    seeds: int,
    eval_tokens: int,
    tokens: int,
    arms: Sequence[str],
) -> Findings:
    """Run it.

    Args:
        seed: of texts, weights, windows and intervals.
        width: of the narrow dense model; all others are twice as wide.
        layers: blocks.
        steps: training steps of 2,048 bytes of each model.
        seeds: models of each arm, trained from other weights and windows.
        eval_tokens: bytes on which the loss is measured.
        tokens: of prose that SmolLM2 reads for the observation.
        arms: which of `ARMS`; the narrow model and MoHD are always among them.
    """
    found = texts.domains(seed, names=("prose", "code"))
    learn = texts.mixed(found)
    judged = [p for pages in zip(*(f[2] for f in found.values()), strict=False) for p in pages]
    arms = tuple(a for a in ARMS if a in arms or a in (NARROW, MOHD))
    losses: dict[str, list[Losses]] = {a: [] for a in arms}
    out = _observed(tokens, seed)
    for arm in arms:
        for s in range(seeds):
            model = build(arm, seed + s, width=width, layers=layers)
            for _ in train_checkpoints(
                learn, activation="silu", checkpoints=(steps,), seed=seed + s, model=model, penalty=_balance
            ):
                pass
            losses[arm].append(nll(model, judged, tokens=eval_tokens, context=CONTEXT, per_document=256))
            if s == 0:
                out.append(
                    Measurement("active parameters", float(active_parameters(model)), "parameters", 1,
                                group={"arm": arm}, note="used for a token, embeddings left out")
                )  # fmt: skip
                if arm != NARROW and arm != WIDE:
                    out.append(_rarest(model, judged, arm))
    return _report(out, losses, seed)


NOTE = (
    "Published: LLaMA-style models of 355M to 1.13B parameters; 1.7% better with half of the active "
    "parameters, 3.7% with three times the parameters at equal active ones. Only the abstract and "
    "secondary pages were at hand: that slices are shared or routed, that activations are scaled and that "
    "groups are fused is the paper's; the router (softmax, top k), where its choice is applied (a "
    "component's input and output), the factor N / (N_s + K) and the form of the fusion (a Monarch matrix "
    "from the identity) are our completion, so a failure here may be ours. Ours: byte-level models of a "
    "few hundred thousand parameters, 16 slices, 4 shared and 4 routed, around attention and MLP of every "
    "block; queries, keys, values and the MLP's hidden layer stay dense and are as wide as the narrow "
    "model's, so that active parameters are equal but for router, fusion and embeddings. 'No shared "
    "slices' routes all 8; a routed slice counts by its gate, which is small at first, so that arm also "
    "starts with smaller outputs. The masked products run at full size, so time says nothing. Intervals "
    "are over documents of one model each in quick mode. Tried before this run: the observation on 600 "
    "tokens of the same corpus in another order, at three blocks; the models in 10 steps, to see that "
    "they train."
)


class _Attention(nn.Module):
    """Attention behind MoHD, called as the decoder layer calls it."""

    def __init__(self, inner: MoHD) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(hidden_states, *args, **kwargs)


def build(arm: str, seed: int, *, width: int, layers: int) -> Model:
    """Return an untrained model of an arm; all but the narrow one have twice the width, with equal heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    d = width if arm == NARROW else 2 * width
    config = LlamaConfig(
        vocab_size=256, hidden_size=d, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=width // 4, hidden_act="silu",
        max_position_embeddings=2 * CONTEXT, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    if arm in (NARROW, WIDE):
        return Model(module, byte_tokenizer(), name=f"byte Llama ({arm})")
    sizes: dict[str, Any] = {"n_sub": SLICES, "n_shared": SHARED, "top_k": ROUTED}
    if arm == ALONE:
        sizes.update(n_shared=0, top_k=SHARED + ROUTED)
    sizes.update(scale=arm != PLAIN, fusion="none" if arm == UNFUSED else "monarch")
    blocks: Any = module.model.layers
    for block in blocks:
        block.self_attn = _Attention(MoHD(block.self_attn, d, **sizes))
        block.mlp = MoHD(block.mlp, d, **sizes)
    return Model(module, byte_tokenizer(), name=f"byte Llama ({arm})")


def _balance(module: nn.Module) -> Tensor:
    said = [m.routed for m in module.modules() if isinstance(m, MoHD)]
    if not said:
        return torch.zeros(())
    return BALANCE * torch.stack([r.balance() for r in said if r is not None]).mean()


def active_parameters(model: Model) -> int:
    """Return how many parameters of the blocks a token uses; half of its width is half of a component."""
    total = 0
    for layer in model.module.model.layers:  # type: ignore[union-attr]
        for name, p in layer.named_parameters():
            share = 1.0
            owner = layer
            for part in name.split(".")[:-1]:  # the component itself is what MoHD uses a part of
                inside = isinstance(owner, MoHD) and part == "component"
                share = owner.active_share if inside else share
                owner = getattr(owner, part)
            total += round(share * p.numel())
    return total


def _rarest(model: Model, documents: list[Any], arm: str) -> Measurement:
    """Return the least share of tokens that a routed slice is chosen for, in any component."""
    counts: dict[str, Tensor] = {}
    handles = []
    for name, layer in model.module.named_modules():
        if isinstance(layer, MoHD):

            def count(own: Any, args: Any, name: str = name) -> None:
                chosen = own.route(args[0].reshape(-1, own.d)).experts
                found = torch.bincount(chosen.flatten(), minlength=own.n_sub - own.n_shared)
                counts[name] = counts.get(name, torch.zeros_like(found)) + found

            handles.append(layer.register_forward_pre_hook(count))
    try:
        found = nll(model, documents, tokens=2048, context=CONTEXT, per_document=256)
    finally:
        for handle in handles:
            handle.remove()
    routed = next(m.top_k for m in model.module.modules() if isinstance(m, MoHD))
    shares = torch.stack([c.double() * routed / c.sum() for c in counts.values()])
    return Measurement(
        "tokens of the rarest routed slice", float(shares.min()), "fraction", int(found.tokens.sum()),
        group={"arm": arm}, note=f"the most frequent one: {float(shares.max()):.2f}",
    )  # fmt: skip


def _observed(tokens: int, seed: int) -> list[Measurement]:
    from actlas.data import corpus
    from actlas.measure.hidden_dims import measure_hidden_dims
    from actlas.models import load

    model = load("smollm2")
    middle = f"blocks.{(model.n_blocks or 1) // 2}.resid_post"
    found = measure_hidden_dims(model, corpus("prose", seed=seed), seed=seed, sites=middle, tokens=tokens)
    return [m.with_group(site="middle", block=middle) for m in found]


def _report(out: list[Measurement], losses: dict[str, list[Losses]], seed: int) -> Findings:
    def per_document(arm: str) -> np.ndarray:
        return np.mean([x.nll / x.tokens for x in losses[arm]], axis=0)

    weights = losses[MOHD][0].tokens
    seeds = len(losses[MOHD])
    options: dict[str, Any] = {"seed": seed, "over": "documents", "note": f"{seeds} model(s) of each arm"}
    rows = []
    for arm in losses:
        out.append(
            mean_measurement("loss", "nats/byte", per_document(arm), weights, group={"arm": arm}, **options)
        )
        rows.append({"model": arm, "loss, nats a byte": out[-1].value})
    for arm in losses:
        if arm != MOHD:
            gap = per_document(arm) - per_document(MOHD)
            out.append(mean_measurement(OVER, "nats/byte", gap, weights, group={"arm": arm}, **options))
    usage, turned = (x.value for x in Measured(out).every("hidden-dim-usage", site="middle"))
    values = ", ".join(f"{arm} {row['loss, nats a byte']:.3f}" for arm, row in zip(losses, rows, strict=True))
    headline = (
        f"{usage:.0%} of SmolLM2's dimensions hold 90% of a token ({turned:.0%} after a rotation); nats a "
        f"byte: {values}"
    )
    return Findings(out, headline, NOTE, [
        Plot("Loss by model", rows, x="model", y="loss, nats a byte", mark="bar")
    ])  # fmt: skip
