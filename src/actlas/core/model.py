"""Model: a PyTorch module with names for its activations.

    model = actlas.load("smollm2")
    trace = model.trace("The capital of France is", "blocks.*.resid_post")
    with model.edit(Add("blocks.15.resid_post", vector) * 4):
        print(model.generate("I feel").texts[0])

Nothing is wrapped or rewritten: `model.module` is the user's own module, with hooks on it only while
somebody reads or edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from actlas.core.edit import Edit
from actlas.core.errors import InputError, ModelError
from actlas.core.fingerprint import Fingerprint, fingerprint_of
from actlas.core.generating import Generation, generate
from actlas.core.inputs import InputEncoder
from actlas.core.installation import Installation, PassWatcher
from actlas.core.layout import Layout, Tower, find, forward_parameters, join, plain_module
from actlas.core.layouts import layout_of
from actlas.core.sites import Site, SiteResolver
from actlas.core.streaming import stream_traces
from actlas.core.trace import Recorder, StopForward, Trace


class Model:
    """A module, its tokenizer or processor, and where its activations are.

    Args:
        module: any `nn.Module`; it is put into evaluation mode.
        tokenizer: a transformers tokenizer, for text.
        processor: what turns images or audio into the module's inputs.
        name: for people.
        kind: what it does; found from the class when `None`.
        source: where it came from, for cards.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        processor: Any = None,
        name: str = "",
        *,
        kind: str | None = None,
        source: str = "",
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ModelError(f"a model must be a torch.nn.Module, not {type(module).__name__}")
        self.module = module.eval()
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name or type(module).__name__
        self.source = source
        plain = plain_module(module)
        self.config: Any = getattr(plain, "config", None)
        self.layout: Layout | None = layout_of(plain)
        self.kind = kind or _kind_of(plain, self.config, self.layout)
        self._installations: list[Installation] = []
        self._resolver = SiteResolver(plain, self.layout)
        self._encoder = InputEncoder(self)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where its first parameter is."""
        first = next(self.module.parameters(), None)
        return first.device if first is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its first floating-point parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    @property
    def tower(self) -> Tower | None:
        """The tower that predicts: the only one, or the last (the decoder)."""
        return self.layout.towers[-1] if self.layout is not None else None

    @property
    def n_blocks(self) -> int | None:
        """Number of blocks of the predicting tower."""
        return self.tower.n_blocks if self.tower else None

    @property
    def d_model(self) -> int | None:
        """Width of the residual stream."""
        return self.tower.d_model if self.tower else None

    @property
    def n_heads(self) -> int | None:
        """Query heads per block."""
        return self.tower.heads if self.tower else None

    @property
    def n_kv_heads(self) -> int | None:
        """Key and value heads per block."""
        return self.tower.kv_heads if self.tower else None

    @property
    def head_dim(self) -> int | None:
        """Width of a head."""
        return self.tower.head_dim if self.tower else None

    @property
    def d_mlp(self) -> int | None:
        """Width of the MLP's hidden layer."""
        return self.tower.d_mlp if self.tower else None

    @property
    def vocab_size(self) -> int | None:
        """Size of the output vocabulary."""
        size = getattr(_text_config(self.config), "vocab_size", None)
        return size if isinstance(size, int) else None

    @property
    def context_length(self) -> int | None:
        """The longest input in tokens, or `None` if the architecture sets no limit."""
        config = _text_config(self.config)
        for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                offset = 2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta") else 0
                return value - offset
        return None

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Architecture, sizes and tokenizer; artifacts carry it."""
        sizes: dict[str, int] = {}
        for tower in self.layout.towers if self.layout else ():
            for field in ("n_blocks", "d_model", "heads", "kv_heads", "head_dim", "d_mlp"):
                sizes[join(tower.name, field)] = getattr(tower, field)
        if self.vocab_size is not None:
            sizes["vocab_size"] = self.vocab_size
        return fingerprint_of(plain_module(self.module), self.tokenizer, sizes)

    def block(self, index: int, tower: str | None = None) -> nn.Module:
        """Return a block by number (negative ones count from the end).

        Raises:
            ModelError: there is no layout or no such block.
        """
        found = self.tower if tower is None else (self.layout.tower(tower) if self.layout else None)
        if found is None:
            raise ModelError(f"{self.name} has no layout, so its blocks are not known")
        if not -found.n_blocks <= index < found.n_blocks:
            raise ModelError(f"{self.name} has blocks 0 to {found.n_blocks - 1}, not {index}")
        module = find(self.module, join(found.blocks, str(index % found.n_blocks)))
        assert module is not None
        return module

    @property
    def final_norm_module(self) -> nn.Module | None:
        """The norm before the output head, if there is one."""
        return find(self.module, self.tower.norm) if self.tower and self.tower.norm else None

    @property
    def unembed_module(self) -> nn.Module | None:
        """The output head, if there is one."""
        return find(self.module, self.tower.unembed) if self.tower and self.tower.unembed else None

    def unembed(self, x: Tensor) -> Tensor:
        """Return the logits of a residual-stream vector: final norm, output head, soft-capping.

        Args:
            x: `[..., d_model]`, e.g. a `resid_post`.

        Returns:
            `[..., vocab]`; for the last block's `resid_post` these are the model's own logits.

        Raises:
            ModelError: the model has no output head over a vocabulary.
        """
        head = self.unembed_module
        if head is None or self.tower is None:
            raise ModelError(f"{self.name} has no output head over a vocabulary")
        norm = self.final_norm_module
        x = norm(x) if norm is not None else x
        if self.tower.logit_scale != 1.0:
            x = x * self.tower.logit_scale
        logits: Tensor = head(x)
        cap = self.tower.softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    # -- sites --------------------------------------------------------------------------------

    def sites(self, pattern: str | None = None) -> list[Site]:
        """Return the canonical sites (absent ones with their reason), or those a pattern names.

        A model without a layout has only `module:` sites; they are returned for every submodule.
        """
        if pattern is not None:
            return self.resolve(pattern)
        found = self._resolver.all()
        if found:
            return found
        return [s for n, _ in self.module.named_modules() if n for s in self.resolve(f"module:{n}")]

    def resolve(self, sites: str | Site | Iterable[str | Site]) -> list[Site]:
        """Return the sites that names and patterns mean here.

        Raises:
            SiteError: a wrong name (with the nearest right ones) or an absent site (with the reason).
        """
        return self._resolver.resolve(sites)

    # -- running ------------------------------------------------------------------------------

    def encode(self, inputs: Any, padding_side: str | None = None, truncate: bool = False) -> dict[str, Any]:
        """Turn text, ids, images or ready-made arguments into the module's keyword arguments.

        Args:
            inputs: a string, a list of strings, a chat (list of `{"role", "content"}`), ids `[pos]` or
                `[batch, pos]`, images, a tensor, or a dictionary of arguments.
            padding_side: `"right"` (default) or `"left"`; left padding comes with position ids.
            truncate: cut what is longer than the context instead of refusing it.

        Raises:
            InputError: empty text, text longer than the context, or a kind the model cannot read.
        """
        return self._encoder.encode(inputs, padding_side, truncate)

    def token_strings(self, ids: Tensor | Sequence[int]) -> list[str]:
        """Return the text of each token id."""
        if self.tokenizer is None:
            raise ModelError(f"{self.name} has no tokenizer")
        return [self.tokenizer.decode([int(i)]) for i in ids]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def forward(self, inputs: Any, **options: Any) -> Any:
        """Run the module on anything `encode` takes, without gradients; edits apply."""
        with torch.no_grad():
            return self._call(self.encode(inputs), **options)

    def _call(self, encoded: dict[str, Any], **options: Any) -> Any:
        arguments = {k: v for k, v in encoded.items() if not k.startswith("_")}
        return self.module(*encoded.get("_args", ()), **arguments, **options)

    def logits(self, inputs: Any) -> Tensor:
        """Return the output logits: `[batch, pos, vocab]`, or `[batch, classes]`.

        Raises:
            ModelError: the model gives none.
        """
        output = self.forward(inputs)
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(found, Tensor):
            raise ModelError(f"{self.name} ({type(self.module).__name__}) gives no logits")
        return found

    def trace(
        self,
        inputs: Any,
        sites: str | Site | Iterable[str | Site],
        *,
        grad: bool = False,
        stop: bool = True,
        max_new_tokens: int = 0,
        attention_rows: int | None = None,
    ) -> Trace:
        """Read activations at sites in one forward pass. Installed edits apply first.

        Args:
            inputs: anything `encode` takes.
            sites: names or patterns.
            grad: keep the graph, so that `trace.gradients(metric)` works. Attention at sites that are
                read is then computed explicitly; otherwise no output bit changes.
            stop: end the pass when the last site has been read (the logits are then not computed).
            max_new_tokens: first generate so many tokens greedily, then read prompt and new tokens.
            attention_rows: at attention sites, read only the last so many query rows.

        Raises:
            SiteError, InputError: a wrong site or unusable input.
        """
        resolved = self.resolve(sites)
        prompt_mask = None
        if max_new_tokens:
            encoded, prompt_mask = self._with_generated(inputs, max_new_tokens)
        else:
            encoded = self.encode(inputs)
        return self._run(
            encoded, resolved, grad=grad, stop=stop, attention_rows=attention_rows, prompt_mask=prompt_mask
        )

    def _run(
        self,
        encoded: dict[str, Any],
        sites: Sequence[Site],
        *,
        grad: bool = False,
        stop: bool = True,
        attention_rows: int | None = None,
        prompt_mask: Tensor | None = None,
        **labels: Any,
    ) -> Trace:
        watcher = PassWatcher(self)
        recorder = Recorder(self, sites, watcher, grad=grad, stop=stop, attention_rows=attention_rows)
        output = None
        with ExitStack() as stack:
            if any(s.tap.flat for s in sites):
                watcher.start()
                stack.callback(watcher.stop)
            if prompt_mask is not None:
                for installed in self._installations:
                    stack.enter_context(installed.generating(prompt_mask.shape[0], prompt_mask))
            recorder.attach(stack)
            stack.enter_context(torch.set_grad_enabled(grad))
            options = {"use_cache": False} if _takes_cache(self.module) else {}
            with suppress(StopForward):
                output = self._call(encoded, **{k: v for k, v in options.items() if k not in encoded})
        missing = [s.name for s in sites if s.name not in recorder.values]
        if missing:
            raise InputError(f"{missing[0]} never ran in this forward pass")
        values = {s.name: recorder.values[s.name] for s in sites}
        length = prompt_mask.shape[1] if prompt_mask is not None else None
        inputs = {k: v for k, v in encoded.items() if not k.startswith("_")}
        return Trace(
            self, sites, values, inputs, output, bases=recorder.bases, prompt_length=length, **labels
        )

    def _with_generated(self, inputs: Any, n: int) -> tuple[dict[str, Any], Tensor]:
        encoded = self.encode(inputs, padding_side="left")
        prompt_mask = encoded["attention_mask"].bool()
        generated = self.generate(encoded, max_new_tokens=n)
        sequences = generated.sequences
        new = sequences.shape[1] - prompt_mask.shape[1]
        real = torch.ones(sequences.shape[0], new, dtype=torch.bool, device=sequences.device)
        for i, ids in enumerate(generated.tokens):
            real[i, len(ids) :] = False
        mask = torch.cat([prompt_mask, real], 1)
        whole = self.encode({"input_ids": sequences, "attention_mask": mask.long()}, padding_side="left")
        return whole, prompt_mask

    def stream(
        self,
        corpus: Iterable[Any],
        sites: str | Site | Iterable[str | Site],
        *,
        batch_tokens: int = 2048,
        context: int | None = None,
        stop: bool = True,
        max_tokens: int | None = None,
        grad: bool = False,
    ) -> Iterator[Trace]:
        """Yield traces over a corpus in constant memory. Installed edits apply.

        Args:
            corpus: strings, or documents with `.text` and `.id`; a generator is fine.
            sites: names or patterns.
            batch_tokens: at most so many tokens in a batch, padding included.
            context: window length in tokens; default the model's context, at most 512.
            stop: end each pass when the last site has been read.
            max_tokens: stop after so many real tokens.
            grad: as in `trace`.

        Raises:
            InputError: the corpus is empty or the window does not fit the model.
        """
        resolved = self.resolve(sites)
        return stream_traces(
            self,
            corpus,
            resolved,
            batch_tokens=batch_tokens,
            context=context,
            stop=stop,
            max_tokens=max_tokens,
            grad=grad,
        )

    # -- editing ------------------------------------------------------------------------------

    def edit(self, *edits: Edit) -> Installation:
        """Install edits for the length of a `with` block; blocks nest, and no edits change nothing.

        Raises:
            SiteError, ShapeError, FingerprintError, InputError: an edit that does not fit, before
            anything is changed.
        """
        return Installation(self, edits)

    @property
    def installed(self) -> tuple[Edit, ...]:
        """The edits that are installed now, in order."""
        return tuple(e for i in self._installations for e in i.edits)

    @contextmanager
    def without_edits(self) -> Iterator[Model]:
        """Take installed edits out for the length of a `with` block, then put them back."""
        held = list(self._installations)
        self._installations.clear()
        for installation in reversed(held):
            installation.uninstall()
        try:
            yield self
        finally:
            for installation in held:
                installation.install()
            self._installations[:] = held

    def generate(
        self,
        inputs: Any,
        *,
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_beams: int = 1,
        seed: int = 0,
        use_cache: bool = True,
        edits_by_row: Sequence[Edit | None] | None = None,
        on_token: Callable[[Tensor], None] | None = None,
        **options: Any,
    ) -> Generation:
        """Generate text. Installed edits apply, with and without a cache, padded, in beams.

        Args:
            inputs: anything `encode` takes; prompts of different lengths are padded on the left.
            max_new_tokens: at most so many new tokens.
            temperature: 0 is greedy (or beam search); above 0 samples.
            top_p: nucleus for sampling.
            num_beams: beams.
            seed: of the sampling.
            use_cache: `False` recomputes the whole sequence at each step.
            edits_by_row: one edit (or `None`) for each prompt of the batch.
            on_token: called with the ids `[rows]` of each step.
            options: passed on to transformers' `generate`.

        Raises:
            ModelError: the model does not generate text.
            InputError: unusable input or options.
        """
        return generate(
            self,
            inputs,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            num_beams=num_beams,
            seed=seed,
            use_cache=use_cache,
            edits_by_row=edits_by_row,
            on_token=on_token,
            options=options,
        )

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.module.parameters())
        return f"<Model {self.name}: {type(self.module).__name__}, {size:,} parameters, {self.kind}>"


def _text_config(config: Any) -> Any:
    return getattr(config, "text_config", None) or config


def _takes_cache(module: nn.Module) -> bool:
    return "use_cache" in forward_parameters(module)


def _kind_of(module: nn.Module, config: Any, layout: Layout | None) -> str:
    name = type(module).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    if getattr(config, "model_type", "") == "whisper":
        return "speech"
    if name.endswith("ForImageClassification"):
        return "image-classifier"
    if getattr(config, "model_type", "") == "clip":
        return "image-text"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if layout is not None and layout.family == "vit":
        return "image-encoder"
    return "encoder" if layout is not None else "module"
