"""The DeepSpeed engine: the only file that imports deepspeed.

DeepSpeed averages gradients over all ranks and divides by the accumulation steps, whatever the
sequence-parallel degree. So each rank returns `Σ loss of its tokens · W·G / T` (W ranks, G accumulation
steps, T valid tokens of the whole global batch): the mean over the global batch's tokens, in every ZeRO
stage. A sequence in chunks is as many accumulation steps.

DeepSpeed would wait for the device in every step: to time it, to look for overflow, to clip. So its timer
and, in bf16, its checks are off, and AdamW clips, and skips an update that is not finite, on the device
(`guard_update`). Its norm takes launches for every parameter, and three waits; its fp32 gradients are
cleared, added to and copied for the sum over ranks, where one pass would do: both are done here
(`_REPLACED`). In fp32 and in ZeRO 3 DeepSpeed looks at the norm all the same, and makes no update of one that
is not finite.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pi_dist.config import GRAPHED_TOKENS, Config, accumulation_steps, num_chunks, replays_graphs
from pi_dist.parallel.mesh import Mesh
from pi_dist.training.cuda_graph import GraphedModel
from pi_dist.training.optimizer import guard_update, learning_rate, make_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def deepspeed_config(config: Config, world_size: int) -> dict:
    """DeepSpeed's own configuration for the run."""
    t, p = config.training, config.parallel
    settings: dict = {
        "train_micro_batch_size_per_gpu": t.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, world_size) * num_chunks(t),
        "gradient_clipping": 0.0,
        "sequence_parallel_size": p.sp_degree,
        "zero_optimization": {"stage": p.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": _low_precision_parameters(config), "check_grad_overflow": False},
    }
    if _low_precision_parameters(config):
        settings["communication_data_type"] = "fp32"
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _low_precision_parameters(config: Config) -> bool:
    """Whether parameters are bf16, beside fp32 masters.

    ZeRO 0 keeps fp32 parameters and computes in bf16 under autocast instead: DeepSpeed's own bf16 without
    ZeRO would accumulate gradients in bf16.
    """
    return config.training.precision == "bf16" and config.parallel.zero_stage > 0


def _worth_reading(record: logging.LogRecord) -> bool:
    """Warnings, but not the one that a CPU is used: the run says so itself."""
    return record.levelno >= logging.WARNING and "Setting accelerator to CPU" not in record.getMessage()


def _square_sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Σ x² over all elements, fp64, in a few launches for any number of tensors."""
    norms = torch._foreach_norm(list(tensors), 2.0, dtype=torch.float64)
    return torch.stack(norms).square().sum()


@torch.no_grad()
def _step_of_bf16(outer: Any) -> None:
    """`BF16_Optimizer.step` (ZeRO 1 in bf16) but for its norm of each parameter and its look at the result.

    Every rank holds the whole gradient, summed, in one tensor a group.
    """
    outer._global_grad_norm = _square_sum(outer.fp32_groups_gradients_flat).sqrt().float()
    masters, gradients = outer.fp32_groups_flat_partition, outer.fp32_groups_gradient_flat_partition
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    outer.optimizer.step()
    outer._lazy_init_hp_params_optimizer_state()
    outer.update_lp_params()
    outer.clear_hp_grads()


@torch.no_grad()
def _add_gradients(outer: Any, **_: Any) -> None:
    """`BF16_Optimizer.update_hp_grads`: a step's first gradients replace what is there, in one launch."""
    of_parameters, totals = [], []
    for parameters, sums, has in zip(
        outer.bf16_groups, outer.fp32_groups_gradients, outer.fp32_groups_has_gradients, strict=True
    ):
        for index, (parameter, total) in enumerate(zip(parameters, sums, strict=True)):
            if parameter.grad is None:
                continue
            if has[index]:
                total.add_(parameter.grad.view_as(total))
            else:
                of_parameters.append(parameter.grad.flatten())
                totals.append(total.flatten())
            parameter._hp_grad = total  # where DeepSpeed finds it
            has[index] = True
    if totals:
        torch._foreach_copy_(totals, of_parameters)


def _forget_gradients(outer: Any) -> None:
    """`BF16_Optimizer.clear_hp_grads`, which leaves it to the next gradients to replace these."""
    outer.fp32_groups_has_gradients = [[False] * len(group) for group in outer.fp32_groups_has_gradients]


@torch.no_grad()
def _sum_over_ranks(engine: Any, **_: Any) -> None:
    """`DeepSpeedEngine.buffered_allreduce_fallback` for `BF16_Optimizer`, whose gradients lie end to end."""
    from deepspeed.utils import groups

    outer, over = engine.optimizer, groups._get_sequence_data_parallel_group()
    for gradients, has in zip(outer.fp32_groups_gradients, outer.fp32_groups_has_gradients, strict=True):
        for gradient, has_one in zip(gradients, has, strict=True):
            if not has_one:
                gradient.zero_()
    if (ranks := dist.get_world_size(over)) > 1:
        for flat in outer.fp32_groups_gradients_flat:
            engine.allreduce_bucket([flat], over, ranks / float(engine.sequence_parallel_size))


@torch.no_grad()
def _norm_of_partitions(outer: Any) -> torch.Tensor:
    """`scaled_global_norm` of other ZeRO 1 and 2: a rank has the summed gradients of its part."""
    total = _square_sum(g for group in outer.averaged_gradients.values() for g in group)
    dist.all_reduce(total, group=outer.dp_process_group)
    return total.sqrt().float()


# by the class of DeepSpeed's optimizer: which of its methods, and of the engine's, are replaced, and by what
_REPLACED: dict[str, tuple[dict[str, Callable], dict[str, Callable]]] = {
    "BF16_Optimizer": (
        {
            "step": _step_of_bf16,
            "update_hp_grads": _add_gradients,
            "clear_hp_grads": _forget_gradients,
        },
        {"buffered_allreduce_fallback": _sum_over_ranks},
    ),
    "DeepSpeedZeroOptimizer": ({"scaled_global_norm": _norm_of_partitions}, {}),
}


class Engine:
    """A model under DeepSpeed ZeRO: backward, step, and its full fp32 state by parameter name.

    Args:
        model: the model, fp32, on the CPU; it is moved and cast.
    """

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        logging.getLogger("DeepSpeed").addFilter(_worth_reading)  # before its import, which already speaks
        import deepspeed
        from deepspeed.accelerator import set_accelerator

        if mesh.device.type == "cpu":
            import deepspeed.ops
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            set_accelerator(CPU_Accelerator())
            # Else a shared-memory all-reduce is compiled for half a minute.
            deepspeed.ops.__compatible_ops__ = {}
        self.config, self.mesh = config, mesh
        self._names = {name: parameter for name, parameter in model.named_parameters()}
        model.to(mesh.device)
        if _low_precision_parameters(config):
            model.to(torch.bfloat16)
        self._graphed = None
        if replays_graphs(config, mesh.device.type):
            self._graphed = GraphedModel(model, math.inf if config.training.cuda_graphs else GRAPHED_TOKENS)
        # its bf16 optimizer prints memory statistics; and it would keep an autograd graph of all parameters,
        # whose nodes for their gradients could not be captured
        with contextlib.redirect_stdout(io.StringIO()), torch.set_grad_enabled(self._graphed is None):
            self.engine, *_ = deepspeed.initialize(
                model=model if self._graphed is None else self._graphed,
                optimizer=make_optimizer(model, config.training),
                config=deepspeed_config(config, mesh.world_size),
                dist_init_required=False,
            )
        self._loss: torch.Tensor | None = None
        kind = type(self.engine.optimizer).__name__
        if self._graphed is not None and kind != "BF16_Optimizer":  # whose hooks would see no gradient
            raise TypeError(
                f"DeepSpeed's optimizer ({kind}) == 'BF16_Optimizer' does not hold; it takes replays"
            )
        self._replaced = _REPLACED.get(kind, ({}, {}))
        for owner, methods in zip((self.engine.optimizer, self.engine), self._replaced, strict=True):
            for name, method in methods.items():
                setattr(owner, name, partial(method, owner))
        self._inner.register_step_pre_hook(self._guard)

    def close(self) -> None:
        """Let go of the model and the optimizer states, which DeepSpeed's hooks would hold on to."""
        for owner, methods in zip((self.engine.optimizer, self.engine), self._replaced, strict=True):
            for name in methods:
                delattr(owner, name)
        if self._graphed is not None:
            self._graphed.forget()
        self.engine.destroy()

    @property
    def replays(self) -> bool:
        """Whether the last micro-batch was replayed, or the next one like it will be."""
        return self._graphed is not None and self._graphed.has_graphs

    def as_it_is(self) -> contextlib.AbstractContextManager[None]:
        """In here, each kernel is launched by the host, whether or not the run replays graphs."""
        return contextlib.nullcontext() if self._graphed is None else self._graphed.as_it_is()

    def eval(self) -> None:
        """No dropout from here on."""
        self.engine.eval()

    def train(self) -> None:
        """Dropout again."""
        self.engine.train()

    def __call__(self, *args: Any) -> torch.Tensor:
        """Call the model."""
        in_bf16 = self.config.training.precision == "bf16"
        with torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=in_bf16 and self._is_plain()):
            return self.engine(*args)

    def backward(self, loss_sum: torch.Tensor, valid_tokens: torch.Tensor) -> None:
        """Add the gradients of one micro-step.

        `loss_sum` is over this rank's tokens, `valid_tokens` counts those of the global batch.
        """
        steps = self.engine.gradient_accumulation_steps()
        self.engine.backward(loss_sum * (self.mesh.world_size * steps) / valid_tokens.clamp(min=1))

    def step(self, step: int, loss: torch.Tensor | None = None) -> None:
        """End a micro-step; at the last one of optimizer step `step`, clip and update.

        No parameter and no moment changes if `loss` or the gradient norm is not finite.
        """
        self._loss = loss
        if self._is_plain() and self.engine.is_gradient_accumulation_boundary():
            self._plain_norm = torch.nn.utils.get_total_norm([p.grad for p in self._names.values()])
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.training, step)
        self.engine.step()

    def _guard(self, inner: torch.optim.AdamW, *_: Any) -> None:
        """Before an update of the inner optimizer, of which DeepSpeed may make several a step."""
        guard_update(inner, self.gradient_norm(), self._loss, self.config.training.clip_norm)

    def gradient_norm(self) -> torch.Tensor:
        """Global gradient norm before clipping, of the last update: a scalar on the device.

        Not finite if the gradient is not.
        """
        norm = self._plain_norm if self._is_plain() else self.engine.optimizer._global_grad_norm
        return torch.as_tensor(norm, device=self.mesh.device)

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full fp32 gradient) of every parameter, after the last backward; collective.

        Call it before the step.
        """
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self._names.items():
            yield name, safe_get_full_grad(parameter)

    def state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """(name, {weight, exp_avg, exp_avg_sq}) of each parameter in turn, whole and fp32; collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._inner.state:
            self._link_moments()
        else:  # no update yet: the first steps were not finite
            self.create_moments(0)
        for name, parameter in self._names.items():
            if self._is_plain():
                moments = self.engine.optimizer.state[parameter]
                yield name, {"weight": parameter.detach()} | {key: moments[key] for key in MOMENTS}
            else:
                full = {"weight": safe_get_full_fp32_param(parameter)}
                yield name, full | {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}

    def load_state(self, read: Callable[[str, str], torch.Tensor], updates: int) -> None:
        """Put the state after `updates` updates back; collective.

        `read(name, key)` gives what `state` yielded.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.create_moments(updates)
        for name, parameter in self._names.items():
            for key in ("weight", *MOMENTS):
                value = read(name, key).to(self.mesh.device)
                if self._is_plain():
                    target = (
                        parameter.data if key == "weight" else self.engine.optimizer.state[parameter][key]
                    )
                    target.copy_(value)
                elif hasattr(parameter, "ds_id"):
                    self._set_partition(parameter, value, key)
                elif key == "weight":
                    safe_set_full_fp32_param(parameter, value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)
        self._refresh_parameters()

    def create_moments(self, updates: int) -> None:
        """Give the inner AdamW the state that it would make in its first step, as after `updates` of them."""
        for flat in self._flat_masters():
            step = torch.tensor(float(updates), device=flat.device if flat.is_cuda else None)
            self._inner.state[flat] = {"step": step} | {key: torch.zeros_like(flat) for key in MOMENTS}
        self._link_moments()

    def _link_moments(self) -> None:
        """Let ZeRO 1 and 2 find each parameter's part of the flat moments.

        DeepSpeed does it in the first update, after the first parameter group, and so misses the second.
        """
        if hasattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_masters(self) -> list[torch.Tensor]:
        """The fp32 tensors that the inner AdamW updates: parameters, or this rank's flat partitions."""
        if self._is_plain():
            return list(self._names.values())
        for owner in (
            "single_partition_of_fp32_groups",
            "fp32_partitioned_groups_flat",
            "fp32_groups_flat_partition",
        ):
            if hasattr(
                self.engine.optimizer, owner
            ):  # ZeRO 1 and 2; ZeRO 3; bf16 without ZeRO's gradient partitions
                return list(getattr(self.engine.optimizer, owner))
        raise TypeError(f"no fp32 partitions known in DeepSpeed's {type(self.engine.optimizer).__name__}")

    def _set_partition(self, parameter: nn.Parameter, value: torch.Tensor, key: str) -> None:
        """ZeRO 3: this rank's partition of a whole tensor, the last one padded with zeros."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.ds_numel
        padded = torch.zeros(size * self.mesh.world_size, dtype=value.dtype, device=value.device)
        padded[: value.numel()] = value.flatten()
        partition = padded[self.mesh.rank * size : (self.mesh.rank + 1) * size]
        if key == "weight":
            safe_set_local_fp32_param(parameter, partition)
        else:
            safe_set_local_optimizer_state(parameter, partition, key)

    def _refresh_parameters(self) -> None:
        """Make the parameters of the forward pass from the fp32 masters."""
        outer = self.engine.optimizer
        if hasattr(outer, "update_lp_params"):
            outer.update_lp_params()
        elif hasattr(outer, "_reassign_or_swap_out_partitioned_parameters"):
            for index in range(len(outer.fp16_groups)):
                outer._reassign_or_swap_out_partitioned_parameters(index)

    @property
    def _inner(self) -> torch.optim.AdamW:
        """The AdamW that DeepSpeed's optimizer, if there is one, calls."""
        return self.engine.optimizer if self._is_plain() else self.engine.optimizer.optimizer

    def _is_plain(self) -> bool:
        """ZeRO 0, whose parameters are fp32: DeepSpeed uses the optimizer as it is."""
        return isinstance(self.engine.optimizer, torch.optim.Optimizer)


@contextlib.contextmanager
def unchecked_across_ranks() -> Iterator[None]:
    """ZeRO 3 compares no list with that of rank 0: for a group in which rank 0 does not exist."""
    from unittest.mock import patch

    from deepspeed.runtime.zero import utils

    with (
        patch.object(utils, "assert_lst_len_same_as_other_ranks", lambda _: None),
        patch.object(utils, "get_lst_from_rank0", lambda own: own),
    ):
        yield


def forget_groups() -> None:
    """Let DeepSpeed ask for the process group again: another will take the place of the one it knows."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    comm.cdb = None
    groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    groups._ALL_TO_ALL_GROUP = {}
