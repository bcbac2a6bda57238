"""Traces and streams: padding, early stop, gradients, constant memory, bad inputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actlas.core.edits import Add
from actlas.core.errors import InputError, ModelError, SiteError
from actlas.core.model import Model
from tests.core.families import BY_NAME

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture
def model() -> Model:
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{w: i + 3 for i, w in enumerate(WORDS)}, "<unk>": 63}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    found = BY_NAME["llama"].model()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    return Model(found.module, tokenizer, name="toy")


def text(n: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + 7 * i) % len(WORDS)] for i in range(n))


def test_padding_does_not_change_what_real_tokens_hold(model: Model) -> None:
    texts = [text(7), text(3, 5)]
    together = model.trace(texts, "blocks.*.resid_post")
    for i, t in enumerate(texts):
        alone = model.trace(t, "blocks.*.resid_post")
        n = alone["blocks.2.resid_post"].shape[1]
        torch.testing.assert_close(together["blocks.2.resid_post"][i, :n], alone["blocks.2.resid_post"][0])
        torch.testing.assert_close(
            together.last("blocks.2.resid_post")[i], alone["blocks.2.resid_post"][0, -1]
        )
    assert together.rows("blocks.2.resid_post").shape == (10, 32)
    left = model.trace(model.encode(texts, padding_side="left"), "blocks.*.resid_post")
    torch.testing.assert_close(left.rows("blocks.2.resid_post"), together.rows("blocks.2.resid_post"))
    torch.testing.assert_close(left.last("blocks.2.resid_post"), together.last("blocks.2.resid_post"))
    assert together.token_strings(1) == text(3, 5).split()


def test_left_padding_with_learned_positions() -> None:
    model = BY_NAME["gpt2"].model()
    ids, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    padded = model.trace(
        model.encode({"input_ids": ids, "attention_mask": mask}, padding_side="left"), "final_norm"
    )
    alone = model.trace(ids[:, 2:], "final_norm")
    torch.testing.assert_close(padded.rows("final_norm"), alone.rows("final_norm"))


def test_the_pass_stops_when_everything_is_read(model: Model) -> None:
    ran: list[int] = []
    handles = [
        b.register_forward_hook(lambda *a, i=i: ran.append(i))
        for i, b in enumerate(model.module.model.layers)
    ]
    assert model.trace(text(4), "blocks.0.mlp.act").output is None
    assert ran == []
    model.trace(text(4), ["blocks.0.mlp.act", "blocks.1.resid_pre"])
    assert ran == [0]
    assert model.trace(text(4), "blocks.0.mlp.act", stop=False).logits.shape[-1] == 67
    for h in handles:
        h.remove()
    with pytest.raises(InputError, match="stop=False"):
        model.trace(text(4), "blocks.0.mlp.act").logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt-neox"])
def test_gradients_equal_finite_differences_of_an_edit(name: str) -> None:
    model = BY_NAME[name].model()
    model.module.double()
    ids = torch.tensor([[3, 14, 15, 9]])
    sites = [s.name for s in model.sites() if s.absent is None and s.block == 1]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 7] - logits[0, -1, 11]

    trace = model.trace(ids, sites, grad=True)
    grads = trace.gradients(metric)
    generator = torch.Generator().manual_seed(0)
    # Llama's norms compute in float32 whatever the model's dtype, hence the wide step.
    step, close = (1e-2, 5e-2) if name == "llama" else (1e-5, 1e-4)
    for site in sites:
        if site.endswith(("scores", "pattern")):
            assert grads[site].shape == trace[site].shape
            continue
        features = trace[site].shape[2:]
        v = torch.randn(*features, generator=generator, dtype=torch.float64)
        values = []
        for s in (step, -step):
            with model.edit(Add(site, v).at(positions=[2]) * s):
                values.append(float(metric(model.logits(ids))))
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx(float((grads[site][0, 2] * v).sum()), rel=close, abs=close * 1e-2), (
            site
        )
    with pytest.raises(InputError, match="grad=True"):
        model.trace(ids, sites[0]).gradients(metric)


def test_attention_gradients(model: Model) -> None:
    ids = torch.tensor([[3, 14, 15, 9]])
    site = "blocks.1.attn.scores"
    trace = model.trace(ids, site, grad=True)
    grad = trace.gradients(lambda logits: logits[0, -1, 7])[site]
    assert float(grad.abs().sum()) > 0
    torch.testing.assert_close(grad.sum(-1), torch.zeros(1, 4, 4), atol=1e-6, rtol=0)


def test_streaming_covers_the_corpus_once_in_constant_batches(model: Model) -> None:
    made = 0

    def corpus() -> Iterator[str]:
        nonlocal made
        for i in range(40):
            made += 1
            yield text(1 + i % 23, i)

    seen = 0
    pieces: dict[str, list[torch.Tensor]] = {}
    for i, trace in enumerate(model.stream(corpus(), "blocks.1.resid_post", batch_tokens=64, context=10)):
        if i == 0:
            assert made < 12
        assert trace.tokens is not None and trace.mask is not None
        assert trace.tokens.numel() <= 64
        seen += int(trace.mask.sum())
        for row, document in enumerate(trace.documents):
            pieces.setdefault(document, []).append(trace.tokens[row][trace.mask[row]])
    assert seen == sum(1 + i % 23 for i in range(40))
    for i in range(40):
        expected = model.tokenizer(text(1 + i % 23, i))["input_ids"]
        assert torch.cat(pieces[str(i)]).tolist() == expected
    limited = model.stream(corpus(), "embed", max_tokens=50)
    assert sum(int(t.mask.sum()) for t in limited if t.mask is not None) == 50


def test_chat_ids_and_dicts_are_inputs_too(model: Model) -> None:
    ids = model.tokenizer(text(5))["input_ids"]
    expected = model.logits(text(5))
    for inputs in (
        ids,
        torch.tensor(ids),
        torch.tensor([ids]),
        {"input_ids": torch.tensor([ids])},
        [text(5)],
    ):
        torch.testing.assert_close(model.logits(inputs), expected)
    with pytest.raises(ModelError, match="chat template"):
        model.logits([{"role": "user", "content": "hello"}])
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}w9"
    torch.testing.assert_close(
        model.logits([{"role": "user", "content": text(5)}]), model.logits(text(5) + " w9")
    )


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ("", "the prompt is empty"),
        ("  \n", "the prompt is empty"),
        (["w1", ""], "prompt 1 is empty"),
        ([], "list of inputs is empty"),
        (text(65), "65 tokens; toy has a context of 64"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"token ids have shape \[1, 2, 3\]"),
        (torch.zeros(1, 0, dtype=torch.long), "no tokens"),
    ],
)
def test_unusable_inputs_are_one_clear_line(model: Model, inputs: object, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        model.trace(inputs, "embed")
    assert "\n" not in str(caught.value)


def test_long_prompts_can_be_truncated_and_generation_knows_the_context(model: Model) -> None:
    assert model.encode(text(100), truncate=True)["input_ids"].shape == (1, 64)
    with pytest.raises(InputError, match="max_new_tokens is 50"):
        model.generate(text(30))
    with pytest.raises(InputError, match="context"):
        next(iter(model.stream([text(5)], "embed", context=1000)))
    with pytest.raises(InputError, match="no text"):
        list(model.stream([], "embed"))
    with pytest.raises(SiteError, match="has not read"):
        model.trace(text(3), "embed")["final_norm"]


def test_generation_returns_new_text_only(model: Model) -> None:
    made = model.generate([text(5), text(2)], max_new_tokens=4)
    assert len(made.texts) == len(made.tokens) == 2
    assert made.prompts == [text(5), text(2)]
    for row, t in zip(made.tokens, made.texts, strict=True):
        assert model.tokenizer.decode(row, skip_special_tokens=True) == t
    steps: list[list[int]] = []
    again = model.generate(text(5), max_new_tokens=4, on_token=lambda t: steps.append(t.tolist()))
    assert [s[0] for s in steps] == again.tokens[0].tolist()
