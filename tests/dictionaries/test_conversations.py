"""Conversations: which token is the template's and whose turn it is in, packing, rows, errors by slice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from actlas.core.errors import InputError, ModelError
from actlas.core.model import Model
from actlas.data.chats import KINDS, chats
from actlas.dictionaries.conversations import (
    LabelledTokens,
    TokenRows,
    pack,
    token_rows,
    tokenise,
    tokenise_text,
)
from actlas.dictionaries.fit import fit_sae
from actlas.dictionaries.reconstruction_slices import reconstruction, squared_errors
from actlas.dictionaries.sources import LiveSource
from actlas.dictionaries.special_tokens import (
    special_token_edit,
    special_token_latents,
    special_token_steering,
)
from actlas.dictionaries.topk import TopKSAE
from tests.core.families import BY_NAME

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|s|>system\nBe kind.<|e|>\n{% endif %}<|s|>{{ m['role'] }}\n{{ m['content'] }}<|e|>\n{% endfor %}"
)
PLAIN_CHATML = "{% for m in messages %}<|s|>{{ m['role'] }}\n{{ m['content'] }}<|e|>\n{% endfor %}"
TRIMMING = (  # Gemma: no system turns, contents trimmed, another name for the assistant
    "<|b|>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|s|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|e|>\n{% endfor %}"
)
INSTRUCTION = (  # Mistral: the end of the user's turn is the assistant's beginning
    "<|b|>{% for m in messages %}{% if m['role'] == 'user' %}[I] {{ m['content'] }} [/I]"
    "{% else %} {{ m['content'] }}<|e|>{% endif %}{% endfor %}"
)


def toy(template: str | None, layers: int = 2) -> Model:
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|s|>", eos_token="<|e|>", unk_token="<|b|>", pad_token="<|e|>"
    )
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return Model(LlamaForCausalLM(config), tokenizer, name="toy chat")


def said(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def spelled(model: Model, one: LabelledTokens) -> list[tuple[str, bool, str]]:
    """Runs of equal labels as (text, special, role)."""
    runs: list[list[Any]] = []
    for token, special, role in zip(one.ids, one.special, one.roles, strict=True):
        text = model.tokenizer.decode([token])
        if runs and runs[-1][1:] == [special, role]:
            runs[-1][0] += text
        else:
            runs.append([text, special, role])
    return [(t, s, r) for t, s, r in runs]


def test_default_system_prompt_markers_and_turns() -> None:
    model = toy(CHATML)
    assert spelled(model, tokenise(model, [said("user", "a<|e|>b", "c")])[0]) == [
        ("<|s|>system\n", True, "system"),
        ("Be kind.", False, "system"),
        ("<|e|>\n", True, "system"),
        ("<|s|>user\n", True, "user"),
        ("user", False, "user"),  # what was said is no marker, however it reads
        ("<|e|>\n", True, "user"),
        ("<|s|>assistant\n", True, "assistant"),
        ("a<|e|>b", False, "assistant"),
        ("<|e|>\n", True, "assistant"),
        ("<|s|>user\n", True, "user"),
        ("c", False, "user"),
        ("<|e|>\n", True, "user"),
    ]
    own = [{"role": "system", "content": "x"}, *said("hi", "yo")]
    assert [r[:2] for r in spelled(model, tokenise(model, [own])[0])[:3]] == [
        ("<|s|>system\n", True), ("x", False), ("<|e|>\n", True)
    ]  # fmt: skip


def test_other_templates() -> None:
    model = toy(PLAIN_CHATML)
    assert spelled(model, tokenise(model, [said("q", "a")])[0])[0] == ("<|s|>user\n", True, "user")
    model = toy(TRIMMING)
    assert spelled(model, tokenise(model, [said(" q ", "a")])[0]) == [
        ("<|b|>", True, "system"),
        ("<|s|>user\n", True, "user"),
        ("q", False, "user"),
        ("<|e|>\n", True, "user"),
        ("<|s|>model\n", True, "assistant"),
        ("a", False, "assistant"),
        ("<|e|>\n", True, "assistant"),
    ]
    model = toy(INSTRUCTION)
    runs = spelled(model, tokenise(model, [said("q", "a", "r", "b")])[0])
    assert [t for t, s, _ in runs if not s] == ["q", "a", "r", "b"]
    assert "".join(t for t, _, _ in runs) == "<|b|>[I] q [/I] a<|e|>[I] r [/I] b<|e|>"


def test_bad_conversations() -> None:
    with pytest.raises(ModelError, match="no chat template"):
        tokenise(toy(None), [said("q")])
    model = toy(TRIMMING)
    with pytest.raises(InputError, match="refuses conversation 0: no system"):
        tokenise(model, [[{"role": "system", "content": "x"}]])
    for wrong, message in (
        ([], "no messages"),
        ("hello", "no messages"),
        ([{"role": "user"}], "without 'role'"),
    ):
        with pytest.raises(InputError, match=message):
            tokenise(model, [wrong])
    with pytest.raises(InputError, match="no conversations"):
        tokenise(model, [])
    shouting = toy("{% for m in messages %}<|s|>{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(InputError, match="leaves out|rewrites"):
        tokenise(shouting, [said("q")])
    cut = tokenise(model, [said("a long question", "and answer")], max_tokens=10)[0]
    assert cut.truncated and len(cut.ids) == len(cut.special) == len(cut.roles) == 10
    labelled = tokenise(model, [said("q", "a")])
    with pytest.raises(InputError, match="packing is 'blocks'"):
        list(pack(labelled, "blocks"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the conversations have 20"):
        token_rows(model, labelled, "blocks.0.resid_post", tokens=10_000)
    with pytest.raises(InputError, match="names 2"):
        token_rows(model, labelled, "blocks.*.resid_post")


def test_conversations_never_meet_and_blocks_do() -> None:
    model = toy(CHATML)
    labelled = tokenise(model, [said(f"question {i}", "x" * (3 * i + 1)) for i in range(5)])
    site = "blocks.1.resid_post"
    rows = token_rows(model, labelled, site, batch_tokens=300)
    alone = torch.cat([model.trace(torch.tensor([one.ids]), site).rows(site) for one in labelled])
    torch.testing.assert_close(rows.x, alone)
    assert rows.token.tolist() == [t for one in labelled for t in one.ids]
    assert (
        rows.position.tolist() == rows.place.tolist() == [i for one in labelled for i in range(len(one.ids))]
    )
    assert [rows.roles[i] for i in rows.role.tolist()] == [r for one in labelled for r in one.roles]
    blocks = token_rows(model, labelled, site, packing="block", block=32)
    stream = [t for one in labelled for t in one.ids]
    by_hand = [
        model.trace(torch.tensor([stream[i : i + 32]]), site).rows(site) for i in range(0, len(stream), 32)
    ]
    torch.testing.assert_close(blocks.x, torch.cat(by_hand))
    assert torch.equal(blocks.token, rows.token) and torch.equal(blocks.position, rows.position)
    assert blocks.place.tolist() == [i % 32 for i in range(len(stream))]
    fewer = token_rows(model, labelled, site, tokens=50)
    torch.testing.assert_close(fewer.x, rows.x[:50])
    assert len(fewer) == 50 and int(fewer.conversation.max()) < 4
    plain = tokenise_text(model, ["some text"])[0]
    assert not any(plain.special) and set(plain.roles) == {"text"}


def test_conversations_are_a_corpus_that_a_trainer_reads() -> None:
    model = toy(CHATML)
    labelled = tokenise(model, [said(f"question {i}", "x" * (3 * i + 1)) for i in range(5)])
    rows = token_rows(model, labelled, "blocks.1.resid_post")
    read = LiveSource(model, labelled, rows.site, keep_massive=True).read(10_000)
    assert read is not None
    torch.testing.assert_close(read.x, rows.x)
    sae = fit_sae(model, labelled, rows.site, width=32, k=4, tokens=256, batch=64)
    assert sae.trained_rows == 256


def planted() -> tuple[TopKSAE, TokenRows]:
    """A dictionary of 4 axis-parallel atoms, and rows that it reconstructs with known errors."""
    eye = torch.eye(4)
    lens = TopKSAE.create("blocks.0.resid_post", 4, 4, k=1)
    lens = replace(lens, W_enc=eye, W_dec=eye.clone(), b_enc=torch.zeros(4), b_dec=torch.zeros(4))
    x = torch.tensor(
        [[3.0, 1, 0, 0], [3, 2, 0, 0], [0, 5, 0, 1], [0, 5, 0, 0], [0, 0, 4, 3], [9000, 0, 0, 30]]
    )
    rows = TokenRows(
        site=lens.site,
        x=x,
        token=torch.tensor([7, 7, 8, 8, 9, 7]),
        special=torch.tensor([True, False, False, True, True, True]),
        role=torch.tensor([0, 0, 1, 1, 0, 0]),
        place=torch.tensor([0, 1, 0, 1, 2, 0]),
        position=torch.tensor([0, 1, 0, 1, 2, 0]),
        conversation=torch.tensor([0, 0, 1, 1, 1, 2]),
        massive=torch.tensor([False] * 5 + [True]),
        roles=("user", "assistant"),
        packing="conversation",
    )
    return lens, rows


def test_reconstruction_by_hand() -> None:
    lens, rows = planted()
    assert squared_errors(lens, rows.x).tolist() == [1, 4, 1, 0, 9, 900]
    found = {(m.name, m.group["tokens"]): m for m in reconstruction(lens, rows, by="special")}
    mse = {k[1]: m.value for k, m in found.items() if k[0].endswith("-mse")}
    # per conversation its mean, then over conversations, then per channel
    assert mse == pytest.approx(
        {
            "all": ((1 + 4) / 2 + 10 / 3) / 2 / 4,
            "special": (1 + 4.5) / 2 / 4,
            "other": (4 + 1) / 2 / 4,
            "massive": 225,
        }
    )
    log = found["reconstruction-mse", "special"].details["log2"]
    assert 2**log == pytest.approx(mse["special"])
    ordinary = rows.x[:5].double()
    spread = (ordinary - ordinary.mean(0)).square().sum(1)
    assert found["reconstruction-nmse", "special"].value == pytest.approx(float(10 / spread[[0, 3, 4]].sum()))
    whole = {m.group["tokens"]: m.value for m in reconstruction(lens, rows, massive="included")}
    assert reconstruction(lens, rows, massive="included")[0].value == pytest.approx(
        (2.5 + 10 / 3 + 900) / 3 / 4
    )
    assert set(whole) == {"all", "massive"}
    roles = [m.group["tokens"] for m in reconstruction(lens, rows, by="role")]
    assert roles[2:6] == ["user", "user", "assistant", "assistant"]
    assert {m.group["tokens"] for m in reconstruction(lens, rows, by="position")} == {
        "all",
        "0",
        "1-3",
        "massive",
    }
    with pytest.raises(InputError, match="by is 'kind'"):
        reconstruction(lens, rows, by="kind")  # type: ignore[arg-type]


def test_reconstruction_of_a_trace() -> None:
    model = toy(PLAIN_CHATML)
    lens = TopKSAE.create("blocks.0.resid_post", 16, 32, k=4)
    trace = model.trace(["abc", "defgh"], lens.site)
    [mse, _] = reconstruction(lens, trace)
    rows = trace.rows(lens.site)
    errors = (rows - lens.reconstruct(rows)).square().mean(1)
    assert mse.value == pytest.approx(float((errors[:3].mean() + errors[3:].mean()) / 2), rel=1e-5)
    assert mse.n == 2


def test_latents_of_special_tokens_and_their_edits() -> None:
    lens, rows = planted()
    found = special_token_latents(lens, rows, 4)
    # special rows without the massive one: codes 3 of latent 0, 5 of latent 1, 4 of latent 2
    assert [f.latent for f in found] == [1, 2, 0]
    assert [f.special for f in found] == pytest.approx([5 / 3, 4 / 3, 1])
    assert [f.other for f in found] == pytest.approx([2.5, 0, 1.5])
    assert found[1].rate_special == pytest.approx(1 / 3) and found[1].token == 9
    with pytest.raises(InputError, match="no row is a special token"):
        special_token_latents(lens, rows[~rows.special], 4)

    model = toy(PLAIN_CHATML)
    sae = replace(TopKSAE.create("blocks.0.resid_post", 16, 32, k=4), scale=3.0)
    chat = said("hello")
    before = model.trace(chat, sae.site)
    with model.edit(special_token_edit(sae, 5, 7.0, model)):
        after = model.trace(chat, sae.site)
    moved = (after[sae.site] - before[sae.site])[0]
    ids = before.tokens
    assert isinstance(ids, Tensor)
    special = torch.isin(ids[0], torch.tensor(model.tokenizer.all_special_ids))
    assert 0 < int(special.sum()) < len(special)
    torch.testing.assert_close(
        moved[special], 7 * sae.W_dec[5].expand(int(special.sum()), -1), rtol=1e-4, atol=1e-5
    )
    assert float(moved[~special].abs().max()) == 0.0
    with model.edit(special_token_edit(sae, 5, 0.0, model)):
        assert torch.equal(model.trace(chat, sae.site)[sae.site], before[sae.site])
    with pytest.raises(InputError, match="no special tokens"):
        special_token_edit(sae, 0, 1.0, BY_NAME["llama"].model())
    with pytest.raises(InputError, match="where is"):
        special_token_edit(sae, 0, 1.0, model, where="here")  # type: ignore[arg-type]


def test_steering_is_shown_beside_its_controls() -> None:
    model = toy(PLAIN_CHATML)
    sae = TopKSAE.create("blocks.0.resid_post", 16, 32, k=4)
    found = special_token_steering(model, sae, [said("hello"), said("you")], [1, 2], alphas=(0.0, 30.0))
    by = {(m.group["alpha"], m.group["direction"]): m for m in found}
    assert by["0", "latents"].value == pytest.approx(0, abs=1e-9) and by["30", "latents"].value > 1e-6
    difference = by["30", "latents minus random"]
    assert difference.value == pytest.approx(by["30", "latents"].value - by["30", "random"].value)
    assert {d for _, d in by} == {"latents", "sign-flipped", "random", "latents minus random"}
    with pytest.raises(InputError, match="at least one prompt"):
        special_token_steering(model, sae, [], [1])


def test_generated_chats() -> None:
    made = chats(40, seed=3)
    assert made == chats(60, seed=3)[:40] and made != chats(40, seed=4)
    assert [c.group["kind"] for c in made[:8]] == [*KINDS, *KINDS]
    assert {c.group["turns"] for c in made} == {"1", "2"}
    assert len({c.text for c in made}) == len({c.id for c in made}) == 40
    for c in made:
        assert [m["role"] for m in c.messages] == ["user", "assistant"] * int(c.group["turns"])
        assert all(m["content"].strip() for m in c.messages)
    sums = [c.messages for c in made if c.group["kind"] == "arithmetic"]
    for question, answer in (m[:2] for m in sums):
        if answer["content"].count("=") == 1 and "+" in answer["content"]:
            left, right = answer["content"].rstrip(".").split("=")
            assert sum(map(int, left.split("+"))) == int(right)
            assert question["content"].startswith("What is")
    with pytest.raises(InputError, match="at least 1"):
        chats(0)
