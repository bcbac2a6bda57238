"""Running requests: one worker, batches of greedy requests, each row under its own edits.

Requests wait in a queue. The worker takes the first and the greedy ones that are waiting with it, pads
them on the left and generates them together; `rows` scopes keep each request's edits to its row, so a
request gets the same tokens alone and in a batch. Sampled requests run alone, because their seed is
theirs. An edit that cannot be limited to rows (a swapped module) runs alone too.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from actlas.core.errors import ActlasError, FailureError, InputError, ModelError

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.serve.jobs import Job

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Event:
    """What happened to a request: a piece of text, its end, or an error.

    Attributes:
        text: new text, possibly empty.
        reason: why it ended, or `None` while it goes on.
        error: what went wrong, if something did.
        tokens: new tokens so far.
    """

    text: str = ""
    reason: Reason | None = None
    error: Exception | None = None
    tokens: int = 0

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.reason is not None or self.error is not None


class Ticket:
    """A request on its way: its text so far, and whether somebody still wants it."""

    def __init__(self, job: Job, emit: Callable[[Event], None], model: Model) -> None:
        self.job, self._emit, self._model = job, emit, model
        self.done = False
        self.cancelled = False
        self.alone = job.temperature > 0 or (job.edit is not None and not _limits_to_rows(job.edit))
        self._new: list[int] = []
        self._sent = ""

    def cancel(self) -> None:
        """Stop working on it as soon as possible: its client has gone."""
        self.cancelled = True

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if not self.done:
            self.done = True
            self._emit(Event(error=error, tokens=len(self._new)))

    def add(self, token: int, ends: set[int]) -> None:
        """Take one new token, and send the text that it completes."""
        if self.done:
            return
        if self.cancelled:
            self._end("cancelled", self._sent)
            return
        if token in ends:
            self._end("stop", self._text())
            return
        self._new.append(token)
        text = self._text()
        cut = min((at for s in self.job.stop if (at := text.find(s)) >= 0), default=-1)
        if cut >= 0:
            self._end("stop", text[:cut])
        elif len(self._new) >= self.job.max_tokens:
            self._end("length", text)
        elif not text.endswith("\ufffd"):  # half a character waits for the rest
            held = max((len(s) - 1 for s in self.job.stop), default=0)
            self._send(text[: len(text) - held] if held else text)

    def finish(self) -> None:
        """End it where the generation ended."""
        if not self.done:
            self._end("length", self._text())

    def _text(self) -> str:
        return str(self._model.tokenizer.decode(self._new, skip_special_tokens=True))

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._emit(Event(text[len(self._sent) :], tokens=len(self._new)))
            self._sent = text

    def _end(self, reason: Reason, text: str) -> None:
        self.done = True
        self._emit(Event(text[len(self._sent) :], reason, tokens=len(self._new)))


class _AllDone(Exception):
    """Every row of the batch has ended; raised to leave `generate`."""


class Engine:
    """A worker thread that runs requests on one model.

    Args:
        model: the model; edits that are installed on it apply to every request.
        max_batch: the most requests that are generated together.
        wait: how long (seconds) the first request waits for others.
        max_waiting: how many requests may wait; more are refused.

    Raises:
        ModelError: the model does not generate text.
    """

    def __init__(
        self, model: Model, *, max_batch: int = 8, wait: float = 0.005, max_waiting: int = 256
    ) -> None:
        if not callable(getattr(model.module, "generate", None)) or model.tokenizer is None:
            raise ModelError(f"{model.name} ({model.kind}) does not generate text, so it cannot be served")
        self.model, self._max_batch, self._wait = model, max_batch, wait
        self._queue: queue.Queue[Ticket | None] = queue.Queue(max_waiting)
        self._held: Ticket | None = None
        self._thread = threading.Thread(target=self._run, name="actlas-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, emit: Callable[[Event], None]) -> Ticket:
        """Queue a request; `emit` is called from the worker with each of its events.

        Raises:
            InputError: an empty prompt, or one that does not fit the context with its new tokens.
            FailureError: too many requests are waiting.
        """
        encoded = self.model.encode([job.inputs] if job.chat else job.inputs)
        job.ids = encoded["input_ids"][0].tolist()
        limit = self.model.context_length
        if limit is not None and len(job.ids) + job.max_tokens > limit:
            raise InputError(
                f"the prompt has {len(job.ids)} tokens and max_tokens is {job.max_tokens}; "
                f"{self.model.name} has a context of {limit}"
            )
        ticket = Ticket(job, emit, self.model)
        try:
            self._queue.put_nowait(ticket)
        except queue.Full:
            raise FailureError(
                f"{self._queue.maxsize} requests are waiting already; try again later"
            ) from None
        return ticket

    def close(self) -> None:
        """End the worker after the running batch."""
        self._queue.put(None)
        self._thread.join(timeout=60)

    def _run(self) -> None:
        while True:
            batch = self._next()
            if batch is None:
                return
            batch = [t for t in batch if not t.cancelled]
            if not batch:
                continue
            try:
                self._generate(batch)
            except ActlasError as error:
                for ticket in batch:
                    ticket.fail(error)
            except Exception as error:  # the server goes on; the request hears of it
                for ticket in batch:
                    ticket.fail(FailureError(f"{type(error).__name__}: {error}"))

    def _next(self) -> list[Ticket] | None:
        """Wait for a request and return it with those that can run with it; `None` means the end."""
        first = self._held if self._held is not None else self._queue.get()
        self._held = None
        if first is None:
            return None
        batch = [first]
        until = time.monotonic() + self._wait
        while not first.alone and len(batch) < self._max_batch:
            try:
                ticket = self._queue.get(timeout=max(until - time.monotonic(), 0.0))
            except queue.Empty:
                break
            if ticket is None:
                self._queue.put(None)
                break
            if ticket.alone:
                self._held = ticket
                break
            batch.append(ticket)
        return batch

    def _generate(self, batch: Sequence[Ticket]) -> None:
        jobs = [t.job for t in batch]
        width = max(len(j.ids) for j in jobs)
        device = self.model.device
        ids = torch.full((len(jobs), width), self.model._encoder.pad_id, device=device)
        mask = torch.zeros(len(jobs), width, dtype=torch.long, device=device)
        for i, job in enumerate(jobs):
            ids[i, width - len(job.ids) :] = torch.tensor(job.ids, device=device)
            mask[i, width - len(job.ids) :] = 1
        ends = self._ends()
        by_row = [j.edit for j in jobs]

        def token(new: Tensor) -> None:
            for ticket, value in zip(batch, new.flatten().tolist(), strict=True):
                ticket.add(int(value), ends)
            if all(t.done for t in batch):
                raise _AllDone

        first = jobs[0]
        whole = first.edit if len(jobs) == 1 else None
        with contextlib.ExitStack() as stack:
            if whole is not None:
                stack.enter_context(self.model.edit(whole))
            stack.enter_context(contextlib.suppress(_AllDone))
            self.model.generate(
                {"input_ids": ids, "attention_mask": mask},
                max_new_tokens=max(j.max_tokens for j in jobs),
                temperature=first.temperature if len(jobs) == 1 else 0.0,
                top_p=first.top_p if len(jobs) == 1 else 1.0,
                seed=first.seed % 2**63,
                edits_by_row=by_row if whole is None and any(by_row) else None,
                on_token=token,
            )
        for ticket in batch:
            ticket.finish()

    def _ends(self) -> set[int]:
        config = getattr(self.model.module, "generation_config", None)
        found = getattr(config, "eos_token_id", None)
        ends = set(found) if isinstance(found, (list, tuple)) else {found}
        ends.add(self.model.tokenizer.eos_token_id)
        return {e for e in ends if e is not None}


def _limits_to_rows(edit: Edit) -> bool:
    try:
        edit.at(rows=0)
    except (ActlasError, NotImplementedError, TypeError):
        return False
    return True
