"""Text, tasks and images that need no network, and loaders for your own.

    corpus("mixed")                          # text in documents; also a file, a folder, JSONL, Parquet
    task("ioi", model.tokenizer, n=64)       # prompts with checked one-token answers
    pairs(task("sentiment"))                 # contrastive pairs
    labelled("pairs.jsonl")                  # texts with labels, or pairs of your own
    edit_requests("edits.jsonl")             # facts to write into a model
    images("photos")

Everything is drawn with a seed, and the same seed gives the same data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actlas.data.chats import chats
from actlas.data.corpora import corpus
from actlas.data.documents import Corpus, Document
from actlas.data.edit_requests import EditRequest, edit_requests
from actlas.data.labelled import labelled
from actlas.data.task_items import Pair, Task, TaskInfo, TaskItem
from actlas.data.tasks import pairs, task, tasks

if TYPE_CHECKING:
    from actlas.data.pictures import ImageSet, images

__all__ = [
    "Corpus",
    "Document",
    "EditRequest",
    "ImageSet",
    "Pair",
    "Task",
    "TaskInfo",
    "TaskItem",
    "chats",
    "corpus",
    "edit_requests",
    "images",
    "labelled",
    "pairs",
    "task",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in ("ImageSet", "images"):  # these need torch, text does not
        from actlas.data import pictures

        return getattr(pictures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
