"""FSDP: parameters, gradients and optimiser state split over the processes, for models too large for each to hold.

This is torch's `fully_shard`, behind the same Runner, and not mmengine's `FSDPStrategy`. That one wraps the model in
`MMFullyShardedDataParallel`, whose step is one backward pass of one loss, while a step here has as many as there are
chunks. Its older FSDP flattens parameters into one tensor a block, which a position embedding that is interpolated for
the step (`torch.func.functional_call`) does not reach, so that images of another size fail; and it refuses scalars,
which CLIP's logit scale is. `fully_shard` keeps parameters apart, each a `DTensor` split along its first dimension, and
averages gradients over processes pass by pass; the sum over passes is the same.

Scalars are not split: every process has them, and their gradients are averaged as those of a run without sharding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from clipbench.errors import UsageError
from clipbench.training.model import TrainedCLIP

# Before it, `fully_shard` could not leave parameters out, or did not see tensors in a dataclass such as `Encoded`.
_OLDEST_TORCH = (2, 14)


class Shards(Hook):
    """Shards a model in place, and has checkpoints and exports as if it were whole.

    A checkpoint holds whole tensors, so that a run may go on with another number of processes.

    Args:
        model: On its device. Its parameters are replaced, so the optimiser is to be made after.

    Raises:
        UsageError: PyTorch is too old.
    """

    def __init__(self, model: TrainedCLIP) -> None:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
            needed = ".".join(map(str, _OLDEST_TORCH))
            raise UsageError(
                f"sharding=fsdp needs PyTorch {needed} or newer, this is {torch.__version__}",
                f"pip install 'torch>={needed}', or --set sharding=none with --set chunks=2.",
            )
        from torch.distributed.fsdp import fully_shard

        for tensor in [*model.parameters(), *model.buffers()]:  # the first process's, as of every model
            dist.broadcast(tensor.data, src=0)
        self._model = model
        self._skeleton = _without_values(model)
        self._gathered: dict[str, Any] = {}
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
        scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
        # Heads are units of their own, since they run after the towers' pass; what is left (embeddings, projections,
        # last norms) makes one more.
        for unit in (*repeated_parts(model.clip), *model.heads.values(), model):
            fully_shard(unit, mesh=mesh, ignored_params=scalars)

    def whole(self) -> TrainedCLIP | None:
        """A copy of the model with all of its values, on its device, in the first process; None in the others.

        All processes must call it.
        """
        state = _whole(self._model.state_dict())
        if dist.get_rank() != 0:
            return None
        whole = _without_values(self._skeleton)
        whole.load_state_dict(state, assign=True)
        return whole.to(next(self._model.parameters()).device).train(self._model.training)

    def gather(self, engine: nn.Module, optim_wrapper: OptimWrapper) -> None:
        """Bring the state of a checkpoint to the first process, into the host's memory. All processes must call it."""
        gathered = {"state_dict": _whole(engine.state_dict()), "optimizer": _whole(optim_wrapper.state_dict())}
        self._gathered = gathered if dist.get_rank() == 0 else {}

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Have mmengine write what `gather` brought, instead of this process's shards."""
        checkpoint.update(self._gathered)
        self._gathered = {}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Cut this process's shards out of whole tensors, before mmengine hands them to model and optimiser."""
        own, loaded = runner.model.state_dict(), checkpoint["state_dict"]
        for name in own.keys() & loaded.keys():
            loaded[name] = _cut(loaded[name], own[name])
        parameters = [p for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]]
        for index, moments in checkpoint["optimizer"]["state"].items():
            for name, value in moments.items():
                if value.shape == parameters[index].shape:  # the number of steps is a scalar
                    moments[name] = _cut(value, parameters[index])


def repeated_parts(module: nn.Module) -> list[nn.Module]:
    """The blocks or stages of towers: members of each outermost list whose members are of one class."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len({type(member) for member in child}) == 1:
            found.extend(member for member in child if any(True for _ in member.parameters()))
        else:
            found.extend(repeated_parts(child))
    return found


def scalars_apart(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups in which scalars, which are never sharded, stand alone: AdamW takes a group at once on a GPU,
    and no operation takes sharded and whole tensors together."""
    found = []
    for group in groups:
        for suffix, is_scalar in (("", False), ("_scalars", True)):
            params = [parameter for parameter in group["params"] if (parameter.ndim == 0) == is_scalar]
            if params:
                found.append({**group, "name": group["name"] + suffix, "params": params})
    return found


def _whole(state: Any) -> Any:
    """A state dict of whole tensors, copied to the host; in processes other than the first without any."""
    first = dist.get_rank() == 0

    def gathered(value: Tensor) -> Tensor | None:
        if isinstance(value, DTensor):
            value = value.full_tensor()  # by all processes, in turn
        return value.detach().to("cpu", copy=True) if first else None

    return apply_to(state, torch.is_tensor, gathered)


def _cut(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as another one is; without communication, as every process has read all of it."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _without_values(model: TrainedCLIP) -> TrainedCLIP:
    """A copy whose parameters take no memory."""
    memo: dict[int, Any] = {id(model.tokenizer): model.tokenizer}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)
