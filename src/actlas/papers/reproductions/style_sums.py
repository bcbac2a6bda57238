"""A tiny language model that answers sums in two styles, short and wordy, always rightly.

    model = style_model(seed=0)
    model.generate("Q 3 + 5 A", temperature=0.8).texts      # ['8 .'] or ['well we take 3 and then ... 8 .']

Two blocks, 64 wide, one token a word. Some of its training texts answer at once, some with 8 to 20
filler words before the same answer, so that the style is open at the end of the question and the answer is
not.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from actlas.core.model import Model
from actlas.core.progress import progress

TOP = 6  # the largest operand
WEIGHT = 3  # of answers in the loss
WORDY = 5 / 6  # of the texts; with the weight above, both styles are about as likely when sampled at 0.8
_FILLERS = ("well", "hmm", "wait", "so", "we", "take", "and", "then", "add", "again", "now", "check", "that")
_MARKS = ("Q", "A", "+", ".")


def sums(seed: int = 0) -> list[tuple[str, str]]:
    """Return all questions with their answers, in an order drawn with the seed."""
    found = [(f"Q {a} + {b} A", str(a + b)) for a in range(TOP + 1) for b in range(TOP + 1)]
    random.Random(seed).shuffle(found)
    return found


def style_text(question: str, answer: str, wordy: bool, draw: random.Random) -> str:
    """Return a question with its answer in one of the styles."""
    fillers = [draw.choice(_FILLERS) for _ in range(draw.randint(8, 20))] if wordy else []
    return " ".join([question, *fillers, answer, "."])


def style_tokenizer() -> Any:
    """Return a transformers tokenizer with one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", *_MARKS, *_FILLERS, *(str(n) for n in range(2 * TOP + 1))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")


def style_model(seed: int = 0, *, steps: int = 1000, batch: int = 48) -> Model:
    """Train the model, with more weight on answers; ten to twenty seconds on one core."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = style_tokenizer()
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=48, n_embd=64, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    module = GPT2LMHeadModel(config)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    draw, questions = random.Random(seed), sums()
    words = tokenizer.get_vocab()
    numbers = torch.zeros(len(words), dtype=torch.bool)
    numbers[[words[str(n)] for n in range(2 * TOP + 1)]] = True

    def after(ids: Tensor) -> Tensor:
        """Return where the answer may stand: after the question."""
        return (ids == words["A"]).cumsum(1) > 0

    with progress("training a model of sums in two styles", steps, "steps") as advance:
        for _ in range(steps):
            texts = [style_text(*draw.choice(questions), draw.random() < WORDY, draw) for _ in range(batch)]
            rows = [[*tokenizer(text)["input_ids"], 1] for text in texts]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            real = ids != 0
            logits = module(input_ids=ids, attention_mask=real.long()).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            weight = real[:, 1:].float() + (WEIGHT - 1) * (
                real[:, 1:] & numbers[ids[:, 1:]] & after(ids)[:, 1:]
            )
            loss = (losses * weight).sum() / weight.sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            advance()
    return Model(module, tokenizer, name="sums in two styles")
