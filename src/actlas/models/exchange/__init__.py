"""Quantised models for other programs: compressed-tensors folders, GGUF files, plain Hugging Face folders.

export(model, edit, "awq3-vllm/", "compressed-tensors")
model, edit = read_compressed("awq3-vllm/")
"""

from actlas.models.exchange.compressed import read_compressed
from actlas.models.exchange.exporting import FORMATS, export, holders

__all__ = ["FORMATS", "export", "holders", "read_compressed"]
