"""Teach a copy of a model a small skill in a few dozen steps, and keep the copy in the cache.

    tuned = tune_skill(model, [("Which box holds the key? ...", " B"), ...], steps=50)

Many circuit studies need a model that can do a task which a small model fails: tracking boxes, answering by
letter, following an intent. A few dozen steps of AdamW on prompts with their answers teach it. The loss is
the cross-entropy of the answer's tokens alone. What is kept is the change of the weights, rounded to
bfloat16, which is also what the returned copy has, so that a copy that was just trained and one out of the
cache are the same. The given model is not touched.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from actlas.core.errors import FailureError, InputError, ModelError, NonFiniteError
from actlas.core.layout import find
from actlas.core.model import Model
from actlas.core.progress import progress

if TYPE_CHECKING:
    from pathlib import Path

    from actlas.data.task_items import TaskItem

Trained = Literal["all-but-embedding", "lora"]
_FILE = "change.safetensors"
_VERSION = 1


@dataclass(frozen=True)
class _Settings:
    steps: int
    batch: int
    lr: float
    train: Trained
    rank: int
    seed: int


def tune_skill(
    model: Model,
    items: Sequence[TaskItem] | Sequence[tuple[str, str]],
    *,
    steps: int = 50,
    batch: int = 12,
    lr: float = 1e-4,
    train: Trained = "all-but-embedding",
    rank: int = 16,
    seed: int = 0,
    cache: bool = True,
) -> Model:
    """Return a copy of a model that was trained to answer prompts.

    Args:
        model: a causal language model with a tokenizer.
        items: task items, or (prompt, answer) with the space that stands before the answer.
        steps: steps of AdamW; the rate rises over the first tenth and stays.
        batch: prompts a step.
        lr: learning rate; for `"lora"` ten times as much is usual.
        train: all weights except the embedding (and an output head tied to it), or low-rank changes of
            the linear maps inside attention (`W + B A / rank * 2`), which cost less memory and time.
        rank: of those.
        seed: of the order of the prompts.
        cache: keep the copy under the cache folder and take it from there the next time. It is found by
            a hash of the model's weights, the prompts and the settings.

    Raises:
        ModelError: not a causal language model with a tokenizer.
        InputError: no items, an item without an answer, or settings that make no sense.
        NonFiniteError: the loss became NaN or infinite.
    """
    settings = _Settings(steps, batch, lr, train, rank, seed)
    rows = _rows(model, items, settings)
    tuned = Model(
        copy.deepcopy(model.module),
        model.tokenizer,
        model.processor,
        f"{model.name} (tuned)",
        kind=model.kind,
    )
    if not cache:
        _apply(tuned, _learn(tuned, rows, settings))
        return tuned
    from actlas.models.cache import cache_folder, fault, locked, publish, seal, withdraw, workplace

    key = _key(model, rows, settings)
    folder = cache_folder() / "tuned" / key[:32]
    origin = {"tuned": key, "version": _VERSION}
    with locked(folder, "a tuned copy") as alone:
        if folder.exists() and fault(folder, origin) is not None:
            withdraw(folder)
        if not folder.exists():
            change = _learn(tuned, rows, settings)
            try:
                with workplace(folder, alone) as work:
                    made = work / "made"
                    made.mkdir()
                    _write(made, change)
                    seal(made, origin)
                    publish(made, folder)
            except OSError as error:
                raise FailureError(
                    f"cannot keep the tuned copy in {folder}: {error.strerror or error}; use cache=False"
                ) from error
        else:
            change = _read(folder)
    _apply(tuned, change)
    return tuned


def skill_accuracy(model: Model, items: Sequence[TaskItem] | Sequence[tuple[str, str]]) -> float:
    """Return the share of prompts whose answer (its first token) is the model's first choice."""
    right = 0
    rows = _rows(model, items, _Settings(1, 1, 1.0, "lora", 1, 0))
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        prompts, first = [r[0] for r in part], torch.tensor([r[1][0] for r in part])
        with torch.no_grad():
            logits = _logits(model, [[*p, 0] for p in prompts], 2)
        right += int((logits[:, 0].argmax(-1).cpu() == first).sum())
    return right / len(rows)


def _rows(model: Model, items: Sequence[Any], settings: _Settings) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of every prompt and of its answer."""
    if model.kind != "causal-lm" or model.tokenizer is None:
        raise ModelError(
            f"{model.name} is a model of kind {model.kind}; a causal-lm with a tokenizer is needed"
        )
    if settings.train not in get_args(Trained):
        raise InputError(f"train is {settings.train!r}; it must be {' or '.join(get_args(Trained))}")
    for name in ("steps", "batch", "rank", "lr"):
        if not getattr(settings, name) > 0:
            raise InputError(f"{name} is {getattr(settings, name)}; it must be above 0")
    if not items:
        raise InputError("there is nothing to learn from; give at least one prompt with its answer")
    rows = []
    for i, item in enumerate(items):
        prompt, answer = item if isinstance(item, tuple) else (item.prompt, item.answer)
        before = model.tokenizer(prompt)["input_ids"]
        whole = model.tokenizer(prompt + answer)["input_ids"]
        after = whole[len(before) :]
        if not prompt.strip() or not after or whole[: len(before)] != before:
            raise InputError(
                f"item {i}: {answer!r} adds no tokens after {prompt[-40:]!r}, or changes those before it"
            )
        rows.append((list(before), list(after)))
    return rows


def _learn(tuned: Model, rows: list[tuple[list[int], list[int]]], settings: _Settings) -> dict[str, Tensor]:
    """Train the copy; return the change of each weight in bfloat16. The copy is left as it began."""
    module = tuned.module
    before = {name: p.detach().clone() for name, p in _trained(tuned)}
    generator = torch.Generator().manual_seed(settings.seed)
    with ExitStack() as stack:
        for p in module.parameters():
            p.requires_grad_(False)
        if settings.train == "lora":
            factors = _factors(tuned, settings, generator, stack)
            weights = [t for pair in factors.values() for t in pair]
        else:
            weights = [p.requires_grad_() for _, p in _trained(tuned)]
        _steps(tuned, rows, weights, settings, generator)
        module.eval()
    if settings.train == "lora":
        scale = 2 / settings.rank
        return {name: (scale * b @ a).detach().to(torch.bfloat16) for name, (a, b) in factors.items()}
    change = {}
    for name, p in _trained(tuned):
        p.requires_grad_(False)
        change[name] = (p - before[name]).to(torch.bfloat16)
        p.copy_(before[name])
    return change


def _steps(
    tuned: Model,
    rows: list[tuple[list[int], list[int]]],
    weights: list[Tensor],
    settings: _Settings,
    generator: torch.Generator,
) -> None:
    optimiser = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=0.0)
    warm = max(1, settings.steps // 10)
    rise = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / warm))
    order: list[int] = []
    tuned.module.train()
    with progress(f"teaching {tuned.name}", settings.steps, "steps") as advance, torch.enable_grad():
        for step in range(settings.steps):
            while len(order) < settings.batch:
                order += torch.randperm(len(rows), generator=generator).tolist()
            chosen, order = [rows[i] for i in order[: settings.batch]], order[settings.batch :]
            keep = max(len(after) for _, after in chosen) + 1
            logits = _logits(tuned, [[*before, *after] for before, after in chosen], keep)
            losses = []
            for row, (_, after) in zip(logits, chosen, strict=True):
                target = torch.tensor(after, device=row.device)
                losses.append(nn.functional.cross_entropy(row[-len(after) - 1 : -1].float(), target))
            loss = torch.stack(losses).mean()
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss is {float(loss)} at step {step}; use a smaller lr")
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            rise.step()
            advance(note=f"loss {float(loss.detach()):.3f}")


def _logits(model: Model, rows: list[list[int]], keep: int) -> Tensor:
    """Return the logits of the last `keep` columns of rows that are padded on the left."""
    from actlas.measure.likelihood import takes_option

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device)
    encoded = model.encode({"input_ids": ids, "attention_mask": mask}, padding_side="left")
    options = {"logits_to_keep": keep} if takes_option(model, "logits_to_keep") else {}
    logits: Tensor = model._call(encoded, use_cache=False, **options).logits
    return logits[:, -keep:]


def _trained(model: Model) -> list[tuple[str, nn.Parameter]]:
    """Return every parameter except the embedding's and the output head's tied to it."""
    embedding = model.module.get_input_embeddings()  # type: ignore[operator]
    held = {id(p) for p in embedding.parameters()}
    return [(n, p) for n, p in model.module.named_parameters() if id(p) not in held]


def _factors(
    tuned: Model, settings: _Settings, generator: torch.Generator, stack: ExitStack
) -> dict[str, tuple[Tensor, Tensor]]:
    """Put low-rank changes on the linear maps inside attention, for as long as `stack` is open."""
    found = {}
    for name, linear in _attention_maps(tuned):
        out, width = linear.weight.shape
        a = torch.randn(settings.rank, width, generator=generator).to(linear.weight) / width**0.5
        b = torch.zeros(out, settings.rank).to(linear.weight)
        a, b = a.requires_grad_(), b.requires_grad_()
        found[f"{name}.weight"] = (a, b)

        def add(m: nn.Module, args: Any, output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return output + (args[0] @ a.T) @ b.T * (2 / settings.rank)

        stack.callback(linear.register_forward_hook(add).remove)
    if not found:
        raise ModelError(f"no linear maps were found inside attention of {tuned.name}; train all weights")
    return found


def _attention_maps(tuned: Model) -> Iterator[tuple[str, nn.Linear]]:
    if tuned.tower is None:
        return
    for block in range(tuned.tower.n_blocks):
        path = f"{tuned.tower.blocks}.{block}.{tuned.tower.attention}"
        attention = find(tuned.module, path)
        for name, part in attention.named_modules() if attention is not None else ():
            if isinstance(part, nn.Linear):
                yield f"{path}.{name}", part


def _apply(tuned: Model, change: dict[str, Tensor]) -> None:
    parameters = dict(tuned.module.named_parameters())
    with torch.no_grad():
        for name, delta in change.items():
            parameters[name].add_(delta.to(parameters[name]))
    for p in tuned.module.parameters():
        p.requires_grad_(True)
    tuned.module.eval()


def _key(model: Model, rows: list[tuple[list[int], list[int]]], settings: _Settings) -> str:
    digest = hashlib.sha256()
    said = [model.fingerprint.to_json(), rows, vars(settings), _VERSION]
    digest.update(json.dumps(said, sort_keys=True).encode())
    for name, p in model.module.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(folder: Path, change: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: t.contiguous().cpu() for name, t in change.items()}, folder / _FILE)


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / _FILE)
