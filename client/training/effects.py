"""Arguments of training that would change nothing, found by trying: what they are given to is made twice.

Hugging Face drops some arguments without a word: an optimizer takes the options that it knows, a constant
schedule has no warm-up. What would change what is learned is refused then; what only says how often something
happens that never does is worth a warning.
"""

import copy
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler

from blindtune.client.recipe.hf_arguments import TrainingSection
from blindtune.errors import ConfigurationError

__all__ = ["idle_arguments", "require_effect"]

# No value of anything, and no name of an option.
_NONSENSE = "\N{EM DASH}"
_OF_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_STEPS_LOOKED_AT = 200


def require_effect(arguments: TrainingArguments, model: Any, optimizer: Optimizer, steps: int) -> None:
    """Checks that the optimizer and the schedule take what they are given.

    Args:
        arguments: of a run.
        model: any that the optimizer can be made for.
        optimizer: made with these arguments.
        steps: of the run.

    Raises:
        ConfigurationError: one of them is dropped.
    """
    for name in _dropped_by_optimizer(arguments, model, optimizer):
        raise _idle(name, f"training.optim {arguments.optim.value}")
    for name in _dropped_by_schedule(arguments, optimizer, steps):
        raise _idle(name, f"training.lr_scheduler_type {arguments.lr_scheduler_type.value}")
    if arguments.load_best_model_at_end and arguments.eval_strategy == "no":
        raise _idle("load_best_model_at_end", "training.eval_strategy no")


def _idle(name: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"training.{name} would change nothing, with {what}: leave it out")


def _dropped_by_optimizer(arguments: TrainingArguments, model: Any, optimizer: Optimizer) -> Iterator[str]:
    made = _options(arguments, model)
    given = (arguments.optim_args or "").replace(" ", "").split(",")
    for pair in filter(None, given):
        name = pair.split("=")[0]
        others = [x for x in given if x != pair]
        without = _options(arguments, model, optim_args=",".join(others))
        if _options(arguments, model, optim_args=",".join([*others, f"{name}={_NONSENSE}"])) == without:
            yield f"optim_args: {name}"
    stock = {field: type(arguments).__dataclass_fields__[field].default for field in _OF_ADAM}
    for name in _OF_ADAM:
        changed = getattr(arguments, name) != stock[name]
        if changed and _options(arguments, model, **{name: stock[name]}) == made:
            yield name
    targets = arguments.optim_target_modules
    if targets and _options(arguments, model, optim_target_modules=None) == made:
        yield "optim_target_modules"
    if arguments.weight_decay and "weight_decay" not in optimizer.defaults:
        yield "weight_decay"


def _options(arguments: TrainingArguments, model: Any, **changes: Any) -> Any:
    """What the optimizer is made with; None where it refuses the arguments."""
    changed = copy.copy(arguments)
    for name, value in changes.items():
        setattr(changed, name, value)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(changed, model)
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return kind, {name: value for name, value in options.items() if name not in ("params", "model")}


def _dropped_by_schedule(arguments: TrainingArguments, optimizer: Optimizer, steps: int) -> Iterator[str]:
    # They would keep the rates they set.
    optimizer = copy.copy(optimizer)
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]

    def schedule(warmup: int, options: Any) -> Any:
        return get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, steps, options)

    options = arguments.lr_scheduler_kwargs
    if options:
        try:
            schedule(0, {_NONSENSE: 0})
        except TypeError:  # as for any name that it does not know
            pass
        else:
            yield "lr_scheduler_kwargs"
    warmup = arguments.get_warmup_steps(steps)
    if warmup and _rates(schedule(warmup, options), steps) == _rates(schedule(0, options), steps):
        yield "warmup_steps"


def _rates(schedule: Any, steps: int) -> list[float]:
    rules = getattr(schedule, "lr_lambdas", ())
    return [rule(step) for rule in rules for step in range(min(steps, _STEPS_LOOKED_AT) + 1)]


def idle_arguments(section: TrainingSection) -> Iterator[str]:
    """What a section says of things that never happen, each in a few words."""
    stock = type(section).model_fields

    def given(*names: str) -> list[str]:
        return [x for x in names if getattr(section, x) != stock[x].get_default(call_default_factory=True)]

    by_measuring = section.load_best_model_at_end or section.save_strategy == "best"
    by_measuring = by_measuring or section.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    for names, happens, why in (
        (("eval_steps",), section.eval_strategy == "steps", f"eval_strategy {section.eval_strategy}"),
        (("eval_delay",), section.eval_strategy != "no", "eval_strategy no"),
        (("save_steps",), section.save_strategy == "steps", f"save_strategy {section.save_strategy}"),
        (("save_total_limit",), section.save_strategy != "no", "save_strategy no"),
        (
            ("logging_steps",),
            section.logging_strategy == "steps",
            f"logging_strategy {section.logging_strategy}",
        ),
        (
            ("metric_for_best_model", "greater_is_better"),
            by_measuring,
            "neither load_best_model_at_end nor save_strategy best nor a schedule that goes by measurements",
        ),
    ):
        for name in [] if happens else given(*names):
            yield f"training.{name} does nothing, with {why}"
