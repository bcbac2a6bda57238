"""An edit gives the same tokens with and without a cache, padded, batched, sampled and in beams."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from actlas.core.edit import Edit
from actlas.core.edits import Add, AttentionEdit, HeadScale, ProjectOut, Replace, Resample, Scale, Zero
from actlas.core.errors import InputError, NonFiniteError
from actlas.core.model import Model
from tests.core.families import BY_NAME
from tests.core.tiny import tiny

V = torch.linspace(-2, 2, 32)
SITE = "blocks.1.resid_post"
PROMPTS = [[3, 14, 15, 9, 26, 5], [8, 9, 7], [30, 31, 32, 33, 34]]


@dataclass
class FirstChannel:
    """A minimal lens."""

    site: str

    def score(self, x: Tensor) -> Tensor:
        return x[..., 0]


GATE = FirstChannel("blocks.0.resid_post")
EDITS: dict[str, Edit] = {
    "add": Add(SITE, V),
    "prompt": Add(SITE, V).at(phase="prompt"),
    "generated": Add(SITE, V).at(phase="generated"),
    "last": Add(SITE, V).at(positions="last"),
    "end of prompt": Add(SITE, V).at(positions=[-1]),
    "first and later": Add(SITE, V).at(positions=[0, 4, 7, 8]),
    "tokens": Add(SITE, 3 * V).at(tokens=list(range(0, 66, 2))),
    "heads": HeadScale("blocks.1.attn.z", {0: 3.0, 2: 0.0}),
    "project": ProjectOut("blocks.*.resid_post", V),
    "resample": Resample("blocks.1.mlp.out", torch.stack([V, -V, V**2])),
    "patch": Replace("blocks.0.mlp.out", V.expand(1, 2, 32)),
    "resid_mid": Scale("blocks.1.resid_mid", 1.5),
    "knockout": AttentionEdit.knockout("blocks.*.attn.scores", (0,)).at(positions=range(1, 30)),
    "temperature": AttentionEdit("blocks.1.attn.scores", temperature=5.0),
    "pattern": Scale("blocks.1.attn.pattern", 2.0),
    "gate per token": Add(SITE, 2 * V).when(GATE),
    "gate per sequence": Add(SITE, 9 * V).when(GATE, per="sequence", threshold=-0.0175),
    "gate on the mean": Add(SITE, 9 * V).when(GATE, per="sequence", reduce="mean", threshold=-0.019),
    "two": Add("blocks.0.resid_post", V) + Zero("blocks.2.attn.z[head=1]").at(phase="generated"),
}


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return {"input_ids": ids, "attention_mask": mask}


def tokens(model: Model, rows: list[list[int]], **options: object) -> list[list[int]]:
    made = model.generate(padded(rows), max_new_tokens=6, eos_token_id=None, **options)
    return [row.tolist() for row in made.sequences[:, max(map(len, rows)) :]]


OTHERS = [("gpt2", n) for n in ("first and later", "resid_mid", "knockout")] + [
    ("gpt-neox", "heads"),
    ("bloom", "last"),
]


@pytest.mark.parametrize(("family", "name"), [("llama", n) for n in EDITS] + OTHERS)
def test_same_tokens_with_and_without_cache_padding_and_batch(family: str, name: str) -> None:
    model = BY_NAME[family].model()
    edit = EDITS[name]
    plain = tokens(model, PROMPTS)
    with model.edit(edit):
        cached = tokens(model, PROMPTS)
        recomputed = tokens(model, PROMPTS, use_cache=False)
        alone = [tokens(model, [p])[0] for p in PROMPTS]
    assert cached == recomputed
    assert cached == alone
    assert tokens(model, PROMPTS) == plain
    if family == "llama" and name not in ("resample", "temperature", "pattern", "knockout"):
        assert cached != plain


@pytest.mark.parametrize(
    "name", ["generated", "last", "first and later", "gate per sequence", "patch", "knockout"]
)
def test_same_tokens_under_beam_search_and_sampling(name: str) -> None:
    model = BY_NAME["llama"].model()
    edit = EDITS[name]
    with model.edit(edit):
        for options in ({"num_beams": 3}, {"temperature": 1.0, "seed": 5}):
            cached = tokens(model, PROMPTS, **options)
            assert cached == tokens(model, PROMPTS, use_cache=False, **options)
            if "num_beams" in options:
                assert cached == [tokens(model, [p], **options)[0] for p in PROMPTS]
    assert tokens(model, PROMPTS, temperature=1.0, seed=5) == tokens(model, PROMPTS, temperature=1.0, seed=5)


def test_rows_carry_different_edits_also_in_beams() -> None:
    model = BY_NAME["llama"].model()
    edits = [Add(SITE, V), None, Add(SITE, -V).at(phase="generated")]
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        together = tokens(model, PROMPTS, edits_by_row=edits, **options)
        for prompt, edit, got in zip(PROMPTS, edits, together, strict=True):
            assert tokens(model, [prompt], edits_by_row=[edit], **options)[0] == got
    with pytest.raises(InputError, match="2 entries for 3 prompts"):
        model.generate(padded(PROMPTS), edits_by_row=[None, None])


def test_transformers_own_generate_sees_the_edit_too() -> None:
    model = BY_NAME["llama"].model()
    with model.edit(EDITS["generated"]):
        ours = tokens(model, PROMPTS)
        theirs = model.module.generate(
            **padded(PROMPTS), max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert [row.tolist() for row in theirs[:, 6:]] == ours


def test_static_cache_gives_the_same_tokens() -> None:
    model = BY_NAME["llama"].model()
    for name in ("last", "first and later", "gate per sequence"):
        with model.edit(EDITS[name]):
            usual = tokens(model, PROMPTS)
            static = tokens(model, PROMPTS, cache_implementation="static", disable_compile=True)
        assert usual == static, name


def test_encoder_decoder_generation_with_beams() -> None:
    model = BY_NAME["t5"].model()
    ids = padded(PROMPTS)
    edits = [
        Add("encoder.blocks.1.resid_post", V).at(rows=1),
        Add("decoder.blocks.1.resid_post", 3 * V).at(phase="generated", rows=[0, 2]),
    ]
    for edit in edits:
        with model.edit(edit):
            a = model.generate(ids, max_new_tokens=6, num_beams=2).sequences
            b = model.generate(ids, max_new_tokens=6, num_beams=2, use_cache=False).sequences
        assert torch.equal(a, b)
    with model.edit(edits[0]):
        whole = model.generate(ids, max_new_tokens=6)
    single = {k: v[1:2] for k, v in ids.items()}
    with model.edit(Add("encoder.blocks.1.resid_post", V)):
        alone = model.generate(single, max_new_tokens=6)
    n = min(whole.sequences.shape[1], alone.sequences.shape[1])
    assert torch.equal(whole.sequences[1, :n], alone.sequences[0, :n])


def test_tracing_generated_tokens_equals_what_generation_saw() -> None:
    model = BY_NAME["llama"].model()
    with model.edit(EDITS["generated"]):
        made = model.generate(padded(PROMPTS), max_new_tokens=5, eos_token_id=None)
        trace = model.trace(padded(PROMPTS), [SITE, "logits"], max_new_tokens=5, stop=False)
    assert trace.prompt_length == 6
    assert trace.tokens is not None and torch.equal(trace.tokens, made.sequences)
    assert torch.equal(trace.logits[:, 5:-1].argmax(-1), made.sequences[:, 6:])


def test_compiled_modules_see_edits() -> None:
    family = BY_NAME["llama"]
    model = family.model()
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model.logits(ids)
    with model.edit(Add(SITE, V)):
        expected = model.logits(ids)
    compiled = Model(torch.compile(model.module, backend="eager"), name="compiled")
    torch.testing.assert_close(compiled.logits(ids), before)
    with compiled.edit(Add(SITE, V)):
        torch.testing.assert_close(compiled.logits(ids), expected)
    torch.testing.assert_close(compiled.logits(ids), before)
    trace = compiled.trace(ids, [SITE])
    torch.testing.assert_close(trace[SITE], model.trace(ids, SITE)[SITE])


def test_generation_stops_at_logits_that_are_not_finite() -> None:
    model = tiny()
    with pytest.raises(NonFiniteError, match=r"at new token 1 under Add at blocks.1.resid_post x 1e\+30"):
        with model.edit(Add("blocks.1.resid_post", torch.full((model.d_model or 0,), 1e30)) * 1e30):
            model.generate("one two", max_new_tokens=3)
    assert model.installed == () and len(model.generate("one two", max_new_tokens=3).tokens[0]) > 0
