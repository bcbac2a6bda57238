"""Which class of transformers loads a checkpoint, and what kind of model that is.

A checkpoint names its class (`"architectures": ["LlamaForCausalLM"]`), and that class is used: another
one would leave weights out or make some up. Where no class is named, the model type decides, the more
special task before the more general (BART is a sequence-to-sequence model before it is a causal one).
"""

from __future__ import annotations

from typing import Any

from actlas.core.errors import ModelError, did_you_mean

# (transformers' table of the task, kind), the more special task first
_TASKS = (
    ("SPEECH_SEQ_2_SEQ", "speech"),
    ("CTC", "speech"),
    ("AUDIO_CLASSIFICATION", "speech"),
    ("SEQ_TO_SEQ_CAUSAL_LM", "seq2seq"),
    ("ZERO_SHOT_IMAGE_CLASSIFICATION", "image-text"),
    ("IMAGE_TEXT_TO_TEXT", "image-text"),
    ("IMAGE_CLASSIFICATION", "image-classifier"),
    ("MASKED_LM", "encoder"),
    ("CAUSAL_LM", "causal-lm"),
)
# a base model, by what it reads
_BASE_KINDS = {"pixel_values": "image-encoder", "input_features": "speech", "input_values": "speech"}
# transformers' automatic class that a checkpoint with code of its own registers
_REMOTE = {
    "AutoModelForCausalLM": "causal-lm",
    "AutoModelForSeq2SeqLM": "seq2seq",
    "AutoModelForSpeechSeq2Seq": "speech",
    "AutoModelForImageClassification": "image-classifier",
    "AutoModelForImageTextToText": "image-text",
    "AutoModelForMaskedLM": "encoder",
    "AutoModel": "encoder",
}


def class_for(config: Any, source: str) -> tuple[Any, str]:
    """Return the transformers class that loads a checkpoint with this config, and its kind.

    Args:
        config: a transformers config.
        source: what is being loaded, for messages.

    Raises:
        ModelError: no class of transformers fits.
    """
    import transformers

    remote = getattr(config, "auto_map", None) or {}
    for name, kind in _REMOTE.items():
        if name in remote:
            return getattr(transformers, name), kind
    declared = (getattr(config, "architectures", None) or [None])[0]
    if declared is not None:
        found = getattr(transformers, declared, None)
        if found is None:
            known = [name for name in dir(transformers) if "For" in name or name.endswith("Model")]
            raise ModelError(
                f"{source} declares the architecture {declared!r}, which transformers"
                f" {transformers.__version__} does not have{did_you_mean(declared, known)}"
            )
        return found, kind_of(found)
    for task, kind in _TASKS:
        fitting = _first(_table(task).get(config.model_type))
        if fitting is not None and task != "MASKED_LM":
            return getattr(transformers, fitting), kind
        if fitting is not None:  # an encoder without a declared head: the head's weights may not be there
            break
    base = _first(_models().get(config.model_type))
    if base is None:
        raise ModelError(f"transformers has no model for the model type {config.model_type!r} of {source}")
    found = getattr(transformers, base)
    return found, kind_of(found)


def kind_of(model_class: type) -> str:
    """Return the kind of a transformers class; a base model, or a classifier of text, is an encoder."""
    name = model_class.__name__
    for task, kind in _TASKS:
        for names in _table(task).values():
            if name == names or (isinstance(names, (tuple, list)) and name in names):
                return kind
    return _BASE_KINDS.get(getattr(model_class, "main_input_name", "input_ids"), "encoder")


def model_types() -> list[str]:
    """Return the model types that transformers knows."""
    from transformers import CONFIG_MAPPING

    return list(CONFIG_MAPPING.keys())


def _table(task: str) -> dict[str, Any]:
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {}))


def _models() -> dict[str, Any]:
    from transformers.models.auto import modeling_auto

    return dict(modeling_auto.MODEL_MAPPING_NAMES)


def _first(names: Any) -> str | None:
    """A table's value is a class name or several; the first is the plain one."""
    if isinstance(names, (tuple, list)):
        return str(names[0]) if names else None
    return names
