"""Training a TopK sparse autoencoder against SAELens, and fitting an ITDA dictionary.

576 -> 4608 features, k = 32, batches of 2048 rows of `blocks.15.resid_post` of `smollm2` on prose. A turn
is a whole short training: the same initial weights, the same batches in the same order, the same learning
rate, clipping at a global norm of 1 and no dead features to revive, so only the way to the gradients
differs. Both let the atoms' norms move while training (SAELens's default; `decoder_norm="free"` here). The
loss that both reach is that of rows that neither was trained on. "Actlas" is the default: on processors
with bfloat16 instructions candidates are found in bfloat16, and values and choice are float32's.

ITDA reads the same rows once, at its defaults. Its time stands beside that of a default training of the
autoencoder (`fit_sae`), which is the time of the turn for so many more rows.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import Figure, Step, Unavailable, fresh, interleave, ratio, report

SITE = "blocks.15.resid_post"
FEATURES, K, BATCH = 4608, 32, 2048
BATCHES, HELD_OUT, STEPS = 8, 4096, 32
RATE = 8e-4
_ROWS = "ACTLAS_BENCH_ROWS"  # the file of rows, made once for all processes


def _harvest() -> Step:
    """Read the rows and write them where all variants find them."""

    def step() -> dict[str, float]:
        import torch
        from safetensors.torch import save_file

        import actlas
        from actlas.data import corpus
        from actlas.dictionaries.sources import LiveSource

        model = actlas.load("smollm2", dtype=torch.float32)
        wanted = BATCHES * BATCH + HELD_OUT
        source = LiveSource(model, corpus("prose"), SITE, max_tokens=wanted + wanted // 8)
        rows = source.read(2 * wanted)
        assert rows is not None and len(rows) >= wanted
        save_file({"x": rows.x[:wanted].contiguous()}, os.environ[_ROWS])
        return {}

    return step


def _rows() -> tuple[Any, Any]:
    """Return training rows and held-out rows."""
    from safetensors.torch import load_file

    if _ROWS not in os.environ:
        raise Unavailable("the rows are made by `python -m bench dictionaries`")
    x = load_file(os.environ[_ROWS])["x"]
    return x[HELD_OUT:], x[:HELD_OUT]


def _untrained(x: Any) -> Any:
    """Return the autoencoder that all variants start from, with its scale and offset set."""
    from actlas.dictionaries.topk import TopKSAE

    sae = TopKSAE.create(SITE, x.shape[1], FEATURES, seed=0, k=K)
    sae.scale = x.shape[1] ** 0.5 / float(x.norm(dim=1).mean())
    sae.b_dec.copy_((x * sae.scale).mean(0))
    return sae


def _timed(start: tuple[float, float], loss: float, x: Any) -> dict[str, float]:
    """Return the turn's numbers; the loss as a fraction of the variance of held-out rows."""
    import time

    seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    return {"seconds": seconds, "cpu": cpu, "loss": loss / float((x - x.mean(0)).square().sum(1).mean())}


def _ours(dtype: str) -> Step:
    import time

    from actlas.dictionaries.objective import TrainSettings
    from actlas.dictionaries.sources import RowsSource
    from actlas.dictionaries.training import train

    x, held = _rows()
    source = RowsSource(x, keep_massive=True)
    settings = TrainSettings(
        tokens=STEPS * BATCH, batch=BATCH, lr=RATE, warmup=0, decay=0, clip=1.0, dead_after=10**9,
        dtype=dtype, decoder_norm="free",  # type: ignore[arg-type]
    )  # fmt: skip

    def step() -> dict[str, float]:
        sae = _untrained(x)
        start = time.perf_counter(), time.process_time()
        train(sae, source, settings, prepare=False, show=False)
        loss = float((sae.reconstruct(held) - held).square().sum(1).mean())
        return _timed(start, loss, held)

    return step


def _saelens(sparse: bool) -> Step:
    import time

    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from actlas.dictionaries.sources import RowsSource

    x, held = _rows()
    source = RowsSource(x, keep_massive=True)

    def batches(scale: float) -> Any:
        for epoch in range(STEPS // BATCHES + 1):
            for batch in source.batches(BATCH, seed=epoch):
                yield batch.x * scale

    def step() -> dict[str, float]:
        first = _untrained(x)
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=x.shape[1], d_sae=FEATURES, k=K, apply_b_dec_to_input=True, use_sparse_activations=sparse
            )
        )
        with torch.no_grad():
            for name, value in (("W_enc", first.W_enc.T), ("W_dec", first.W_dec), ("b_dec", first.b_dec)):
                getattr(sae, name).copy_(value)
        config = SAETrainerConfig(
            total_training_samples=STEPS * BATCH,
            train_batch_size_samples=BATCH,
            lr=RATE,
            lr_end=RATE,
            dead_feature_window=10**9,
            logger=LoggingConfig(log_to_wandb=False),
        )
        start = time.perf_counter(), time.process_time()
        try:
            SAETrainer(cfg=config, sae=sae, data_provider=batches(first.scale)).fit()
        except NotImplementedError as missing:
            raise Unavailable(f"SAELens fails here: {str(missing).splitlines()[0][:90]}") from missing
        with torch.no_grad():
            error = sae(held * first.scale) / first.scale - held
        return _timed(start, float(error.square().sum(1).mean()), held)

    return step


def _itda() -> Step:
    import time

    import torch

    from actlas.dictionaries.itda import fit_itda

    x, held = _rows()

    def step() -> dict[str, float]:
        start = time.perf_counter(), time.process_time()
        lens = fit_itda(None, x, SITE, tokens=None, held_out=0)
        with torch.no_grad():
            error = lens.reconstruct(held) - held
        return _timed(start, float(error.square().sum(1).mean()), held) | {"atoms": float(lens.features)}

    return step


VARIANTS = {
    "rows": _harvest,
    "Actlas": lambda: _ours("auto"),
    "Actlas, float32 product": lambda: _ours("float32"),
    "SAELens": lambda: _saelens(False),
    "SAELens, sparse activations": lambda: _saelens(True),
    "ITDA": _itda,
}


def main(rounds: int) -> bool:
    """Measure and report; return whether the targets are met."""
    names = [name for name in VARIANTS if name != "rows"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_ROWS] = str(Path(folder) / "rows.safetensors")
        try:
            fresh("bench.dictionaries", "rows")
            samples, unavailable = interleave("bench.dictionaries", names, rounds)
        finally:
            del os.environ[_ROWS]
    tokens = STEPS * BATCH
    figures = []
    peers = [name for name in samples if name.startswith("SAELens")]
    if not peers:
        why = unavailable["SAELens"]
        figures.append(Figure("TopK training time against SAELens", None, "x", 0.25, why))
    else:
        peer = min(peers, key=lambda name: sorted(samples[name]["seconds"])[rounds // 2])
        for name, most in (("Actlas", 0.25), ("Actlas, float32 product", None)):
            speeds = [tokens / sorted(samples[n]["seconds"])[rounds // 2] for n in (name, peer)]
            note = f"{speeds[0]:,.0f} against {speeds[1]:,.0f} tokens/s"
            what = f"{name}: TopK training time against {peer}"
            figures.append(ratio(what, samples[name], samples[peer], most, note))
            loss, theirs = samples[name]["loss"][0], samples[peer]["loss"][0]
            note = f"held-out variance unexplained after {tokens:,} tokens: {loss:.4f} and {theirs:.4f}"
            what = f"{name}: loss above that of {peer} at equal tokens"
            figures.append(Figure(what, loss / theirs - 1, "of it", 0.01, note))
    figures += [Figure(f"{name}: training time", None, "s", note=why) for name, why in unavailable.items()]
    figures.append(_itda_figure(samples, tokens))
    title = f"Dictionaries, {FEATURES} features, k = {K}, batch {BATCH}, {tokens:,} tokens"
    return report("dictionaries", title, figures, {"samples": samples})


def _itda_figure(samples: dict[str, Any], tokens: int) -> Figure:
    from actlas.dictionaries.fit import DEFAULT_TOKENS

    whole = {of: [v * DEFAULT_TOKENS / tokens for v in samples["Actlas"][of]] for of in ("seconds", "cpu")}
    itda = samples["ITDA"]
    note = (
        f"{BATCHES * BATCH:,} rows once, {itda['atoms'][0]:,.0f} atoms, variance unexplained "
        f"{itda['loss'][0]:.4f}; the autoencoder's default is {DEFAULT_TOKENS:,} rows"
    )
    return ratio("ITDA's time against a default training of the autoencoder", itda, whole, 1 / 20, note)
