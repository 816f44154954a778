"""How a model is laid out over processes, and where among them this one stands.

    processes = stages x data        experts divides data

`stages` cut the layers one after the other. The `data` processes of a stage read different samples and share its
parameters (FSDP). `experts` of them at a time also share the routed experts: each holds E / experts of every layer, and
tokens travel to them; where data is more than experts, there are data / experts such sets, and an expert's matrices are
sharded over those. Rank = stage x data + data rank, and neighbours share experts: within a machine all-to-all is cheap.
Knows no models beyond what must divide.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from daedal.config import ModelConfig
from daedal.errors import ConfigError
from daedal.train.bounds import whole
from daedal.train.processes import Processes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """data: processes of a stage. experts: of these, how many share the experts of a layer. stages: of the pipeline."""

    data: int = 1
    experts: int = 1
    stages: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "experts", "stages"):
            whole(name, getattr(self, name), low=1)
        if self.data % self.experts:
            raise ConfigError(
                f"experts is {self.experts} and data is {self.data}: experts are spread over processes that read "
                "different samples, so `experts` must divide `data`"
            )

    @classmethod
    def of(cls, processes: int, *, experts: int = 1, stages: int = 1) -> "Layout":
        """The layout of so many processes: as much data parallelism as the rest leaves."""
        whole("processes", processes, low=1)
        whole("stages", stages, low=1)
        if processes % stages:
            raise ConfigError(
                f"{processes} processes do not divide into {stages} stages: start a multiple of {stages}, or choose "
                "another number of stages"
            )
        return cls(data=processes // stages, experts=experts, stages=stages)

    @property
    def processes(self) -> int:
        return self.data * self.stages

    @property
    def replicas(self) -> int:
        """Sets of processes that each hold all experts."""
        return self.data // self.experts

    def check(self, config: ModelConfig) -> None:
        """ConfigError where a model cannot be laid out so."""
        if self.stages > config.num_hidden_layers:
            raise ConfigError(
                f"stages is {self.stages} and the model has {config.num_hidden_layers} layers: each stage needs one"
            )
        if self.experts == 1:
            return
        if "sparse" not in _feed_forwards(config):
            raise ConfigError(f"experts is {self.experts}, but {config.model_type} has no routed experts: leave it 1")
        if config.n_routed_experts % self.experts:
            raise ConfigError(
                f"experts is {self.experts} and the model has {config.n_routed_experts} in a layer: give a divisor"
            )
        assert config.moe_intermediate_size is not None
        for name, rows in (
            ("moe_intermediate_size", config.moe_intermediate_size),
            ("hidden_size", config.hidden_size),
        ):
            if rows % self.replicas:
                raise ConfigError(
                    f"{name} is {rows} and data / experts is {self.replicas}: that many processes share the rows of an "
                    "expert's matrices, so it must divide them"
                )


def _feed_forwards(config: ModelConfig) -> set[str]:
    kinds = {config.mlp_kind(layer) for layer in range(config.num_hidden_layers)}
    return {"sparse" if kind == "hash" else kind for kind in kinds}


class Place:
    """Where this process stands. All processes make theirs at the same time, with the same layout.

    stage, data_rank: its coordinates. data: the mesh of those that share its stage. replica, expert: the two axes of
    these, see `Layout`. samples: those that read different samples. everyone: all. ahead, back: groups of those with
    the same data rank, one for each direction in which a pipeline sends. ends: of these the first and last stage.
    """

    def __init__(self, layout: Layout, device: torch.device | str = "cpu"):
        world = dist.get_world_size()
        if world != layout.processes:
            raise ConfigError(
                f"{world} processes run, the layout has {layout.processes} (data {layout.data} x stages "
                f"{layout.stages}): start that many, or change the layout"
            )
        self.layout, self.device = layout, torch.device(device)
        self.stage, self.data_rank = divmod(dist.get_rank(), layout.data)
        kind = self.device.type
        mesh = init_device_mesh(kind, (layout.stages, layout.data), mesh_dim_names=("stage", "data"))
        deep = init_device_mesh(
            kind, (layout.stages, layout.replicas, layout.experts), mesh_dim_names=("stage", "replica", "expert")
        )
        self.data: DeviceMesh = mesh["data"]
        self.replica: DeviceMesh = deep["replica"]
        self.expert: DeviceMesh = deep["expert"]
        self.samples = Processes(group=self.data.get_group(), device=self.device)
        self.everyone = Processes(group=dist.group.WORLD, device=self.device)
        self.ahead = mesh.get_group("stage")
        self.back, self.ends = self.ahead, self.ahead
        if layout.stages > 1:
            for rank in range(layout.data):
                column = list(range(rank, layout.processes, layout.data))
                back, ends = dist.new_group(column), dist.new_group([column[0], column[-1]])
                if rank == self.data_rank:
                    self.back, self.ends = back, ends

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.layout.stages - 1

    def rank_of(self, stage: int) -> int:
        """The process of another stage that works on the same samples."""
        return stage * self.layout.data + self.data_rank
