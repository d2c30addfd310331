"""One training process or many: who takes part, and how the model is laid out over them.

Gradients are summed over units (supervised tokens, images), never averaged over processes, so that n processes do what
one would do. Both ways of spreading a model average instead; the factor is put back where gradients are scaled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from depthlm_ros.errors import ConfigError

if TYPE_CHECKING:
    from depthlm_training.objective import Loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        device: where this one computes.
        rank: its number.
        size: how many there are.
        hosts: on how many machines.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    hosts: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums each value over the processes; all of them have to call."""
        if self.size == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(totals)
        return totals.tolist()

    def wait(self) -> None:
        """Goes on when all processes have come here."""
        self.sum([0.0])


@contextmanager
def joined(parallel: str, device: str) -> Iterator[Processes]:
    """Joins the processes that torchrun started; without torchrun there is one, whatever `parallel` says.

    A process group that is there already is used and left as it is.

    Raises:
        ConfigError: several processes and `parallel` none, or cuda without a GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and parallel == "none":
        raise ConfigError(f"torchrun started {size} processes, but train.parallel is none; set it to ddp or fsdp2")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = _device(device, local)
    if size == 1:
        yield Processes(where)
        return
    ours = not distributed.is_initialized()
    if ours:
        # Counts are summed on the CPU, so gloo is there beside NCCL.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    yield Processes(where, distributed.get_rank(), size, size // int(os.environ["LOCAL_WORLD_SIZE"]))
    # Not after an error: the others still wait for this process, and torchrun ends them.
    if ours:
        distributed.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """Ends this process with an exit status; one of several at once, without the interpreter's own end.

    Threads of a process group live as long as what still refers to it. One of them that asks for the interpreter's lock
    while the interpreter ends is unwound through C++, which aborts ("terminate called without an active exception"),
    and torchrun then calls a training failed whose last checkpoint is written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _device(name: str, local: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"device is cuda, and process {local} of this host finds {torch.cuda.device_count()} GPUs; "
            "start as many processes as there are GPUs, or set train.device to cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


class Network(nn.Module):
    """The forward pass of an objective as a module, which is what DDP and FSDP2 hook into."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, torch.device], Loss], dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self._loss, self._dtype = loss, dtype

    def forward(self, batch: Any, device: torch.device) -> tuple[torch.Tensor, Loss]:
        """The sum of the loss by itself, where the hooks find it, and all of it."""
        with torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32):
            loss = self._loss(batch, device)
        return loss.total, loss


def spread(network: Network, parallel: str, dtype: torch.dtype, processes: Processes) -> nn.Module:
    """Moves a network to its device, and lays it out over the processes.

    Weights that are trained become float32 first, since a step of 1e-5 of a bfloat16 weight is lost to rounding; frozen
    ones take the format of the products, as they have it at inference.

    Args:
        network: on the CPU.
        parallel: none, ddp, fsdp2 or hybrid.
        dtype: of products, in which FSDP2 gathers weights.
        processes: who takes part.
    """
    for weight in network.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else dtype)
    if processes.size == 1:
        return network.to(processes.device)
    if parallel == "ddp":
        network.to(processes.device)
        # A head may have nothing to learn from a micro-batch.
        return DistributedDataParallel(network, find_unused_parameters=True, gradient_as_bucket_view=True)
    return _sharded(network, parallel, dtype, processes)


def _sharded(network: Network, parallel: str, dtype: torch.dtype, processes: Processes) -> nn.Module:
    for weight in network.parameters():
        if weight.requires_grad:  # a new head is random, another one in every process
            distributed.broadcast(weight.data, 0)
    if parallel == "hybrid":
        shape, names = (processes.hosts, processes.size // processes.hosts), ("hosts", "shards")
    else:
        shape, names = (processes.size,), ("shards",)
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    # One layer's weights are whole at a time; what lies outside of the layers stays whole during a pass.
    for layer in [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(network, mesh=mesh, mp_policy=policy)


def passing(network: nn.Module, last: bool) -> AbstractContextManager:
    """The context of one micro-batch: DDP adds gradients up over processes after the last one of a step.

    FSDP2 does so after each, since keeping a whole gradient in between would take the memory that sharding saves.
    """
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all of its shards; all processes have to call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(value: torch.Tensor, into: torch.Tensor) -> None:
    """Copies a whole tensor into one that may be sharded."""
    if isinstance(into, DTensor):
        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(value)
