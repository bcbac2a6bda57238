"""The transformers Trainer adds a penalty to its loss, through a callback and no subclass.

    Trainer(model.module, args, train_dataset=..., callbacks=[penalty.callback()])

While training runs, a hook on the whole model adds the penalty to `output.loss`. The Trainer divides the loss
by the number of accumulation steps, except where the model takes `num_items_in_batch` and normalises itself;
the penalty is then divided here, so that it always is the mean over the micro-batches of a step. Evaluation
sees the task's loss alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actlas.core.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from actlas.training.density import ActivationPenalty


def penalty_callback(penalty: ActivationPenalty) -> Any:
    """Return the callback; see `ActivationPenalty.callback`."""
    from transformers import TrainerCallback

    class PenaltyCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Adds an activation penalty to the loss of a Trainer."""

        def __init__(self) -> None:
            self.accumulate = 1
            self.hook: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.accumulate = args.gradient_accumulation_steps
            penalty.step = state.global_step
            penalty.__enter__()
            self.hook = penalty.model.module.register_forward_hook(self.add, with_kwargs=True)

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            penalty.step = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs is not None and "loss" in logs:
                for record in (logs, state.log_history[-1]):  # what other callbacks see, and what is kept
                    record |= {"zero_rate": penalty.zero_rate, "penalty_weight": penalty.weight}

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.hook.remove()
            penalty.__exit__()

        def add(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not module.training:
                return None
            loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
            if loss is None:
                raise ModelError(
                    f"{type(module).__name__} returned no loss; give it labels, or use the penalty in a loop"
                )
            normalises = kwargs.get("num_items_in_batch") is not None
            output["loss"] = loss + penalty.value() / (self.accumulate if normalises else 1)
            return output

    return PenaltyCallback()
