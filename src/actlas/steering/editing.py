"""Knowledge editing as a stream: facts come one after the other, and what is left of them is measured.

    editor = WiseEditor(model, settings=WiseSettings(save_freq=10))
    edit, found = edit_stream(model, editor, requests, at=(1, 10, 20))

After each of the numbers in `at`, the facts written so far are measured: how many are still said
(reliability), also in other words (generality); after the last one also whether unrelated prompts are as
they were (locality).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from actlas.core.errors import InputError
from actlas.core.measurement import Measurement
from actlas.core.progress import progress
from actlas.measure.editing import CleanOutputs, clean_outputs, editing_measurements
from actlas.steering.edit_rows import Editor

if TYPE_CHECKING:
    from actlas.core.edit import Edit
    from actlas.core.model import Model
    from actlas.data.edit_requests import EditRequest


def edit_stream(
    model: Model,
    editor: Editor,
    requests: Sequence[EditRequest],
    *,
    at: Sequence[int] = (),
    clean: CleanOutputs | None = None,
    name: str = "",
    seed: int = 0,
) -> tuple[Edit, list[Measurement]]:
    """Write requests one after the other and measure on the way.

    Args:
        model: the model that `editor` edits.
        editor: `WiseEditor`, `RomeEditor`, `TuningEditor`, or anything with `add` and `edit`.
        requests: the facts, in order.
        at: after how many facts to measure; the last one is always measured.
        clean: what the unedited model says; taken here if missing.
        name: group label `editor` of the measurements.
        seed: of the bootstraps.

    Returns:
        The last edit, and the measurements with the group `{"editor": name, "facts": count}`.

    Raises:
        InputError: no requests, or a number in `at` that is not between 1 and their count.
    """
    if not requests:
        raise InputError("there are no edit requests; give at least one")
    wrong = next((k for k in at if not 1 <= k <= len(requests)), None)
    if wrong is not None:
        raise InputError(f"at names {wrong} facts; there are 1 to {len(requests)}")
    clean = clean or clean_outputs(model, requests)
    stops = sorted({*at, len(requests)})
    found: list[Measurement] = []
    edit: Edit | None = None
    with progress(f"writing facts ({name or type(editor).__name__})", len(requests), "facts") as advance:
        for count, request in enumerate(requests, start=1):
            editor.add(request)
            advance()
            if count not in stops:
                continue
            edit = editor.edit()
            so_far = list(requests[:count])
            if count < len(requests):
                so_far = [replace(r, locality=()) for r in so_far]
            with model.edit(edit):
                measured = editing_measurements(model, so_far, clean, seed=seed)
            found += [m.with_group(editor=name, facts=str(count)) for m in measured if m.n]
    assert edit is not None
    return edit, found
