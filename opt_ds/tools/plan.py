"""What a run will need before it is started: memory, micro-batch budget, accumulation, operations, traffic, time, and its bound.

Memory is the model of `memory.py` (held by tests to measured CPU peaks); on GPUs nothing of this has been measured. Times are
arithmetic: operations over the data sheet's peak times `utilisation`, bytes over the link's rate times `link_efficiency`.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np

from opt_ds.config import Config
from opt_ds.data.batch import Packer
from opt_ds.data.flops import step_flops
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.plan import StepPlan
from opt_ds.data.planned import PlannedStep
from opt_ds.data.samples import SampleReader
from opt_ds.errors import UserError
from opt_ds.store.reader import FeatureStore
from opt_ds.tools.activations import ActivationTracer
from opt_ds.tools.assumed_store import AssumedStore
from opt_ds.tools.memory import FRAGMENTATION, RankMemory, rank_memory
from opt_ds.training.deepspeed_config import Hardware, Precision, choose_precision
from opt_ds.training.hardware import Gpu

_BUDGET_STEP = 256  # budgets are given in multiples of it
_MOST_ROUNDS = 6  # traces in the search for the largest one
_AIM, _NEAR = 0.99, 1.02  # below the limit, and near enough to it: micro-batches differ in their padding
_OTHER_BYTES = 64 * 2 + 8  # image codes and the sample's own numbers


@dataclass(frozen=True)
class Cluster:
    """The machine that is planned for. `network_bandwidth` is a node's, in bytes a second, one direction."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8
    network_bandwidth: float = 100e9 / 8
    utilisation: float = 0.35
    link_efficiency: float = 0.6

    @property
    def device(self) -> str:
        return "cpu" if self.gpu.name == "cpu" else "cuda"

    @property
    def hardware(self) -> Hardware:
        if self.device == "cpu":
            return Hardware("cpu", self.gpu.name)
        return Hardware("cuda", self.gpu.name, self.gpu.capability, (f"sm_{self.gpu.capability[0]}{self.gpu.capability[1]}",))

    @property
    def rank_bandwidth(self) -> float:
        """Bytes a second that a rank exchanges with the others: the network's share where there are several nodes."""
        link = self.gpu.link_bandwidth
        if self.num_gpus > self.gpus_per_node:
            link = min(link, self.network_bandwidth / self.gpus_per_node)
        return link * self.link_efficiency


@dataclass(frozen=True)
class RunPlan:
    """All figures; memory in bytes a rank, times in seconds, traffic in bytes a rank and step."""

    preset: str
    gpu: str
    num_gpus: int
    precision: Precision
    zero_stage: int
    offload: bool
    samples: str
    parameters: int
    memory_limit: float
    memory: RankMemory  # at batch.max_tokens
    fits: bool
    largest_budget: int  # the largest batch.max_tokens that fits; 0: none does
    max_tokens: int  # what the figures below are for: batch.max_tokens, or the largest budget where that is smaller
    batch_samples: int
    accumulation: int
    fill: float
    flops_per_step: float
    communication_bytes: float
    bytes_per_sample: float
    read_rate: float  # bytes a second over all ranks that keep the GPUs busy
    compute_s: float
    communication_s: float
    step_s: float
    total_steps: int
    total_s: float
    bound: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; memory with its total."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def plan_run(config: Config, cluster: Cluster, stores: list[FeatureStore] | AssumedStore) -> RunPlan:
    """Plan a run of this configuration on this cluster. Raises UserError for a precision that the GPU or DeepSpeed cannot do."""
    return _Planner(config, cluster, stores).plan()


class _Planner:
    def __init__(self, config: Config, cluster: Cluster, stores: list[FeatureStore] | AssumedStore) -> None:
        self.precision = choose_precision(config, cluster.hardware)
        self.config, self.cluster = config, cluster
        self.stores = stores if isinstance(stores, list) else cast(list[FeatureStore], [stores])
        self.tracer = ActivationTracer(config, self.precision, cluster.device)
        self.parameters = sum(p.numel() for p in self.tracer.model.parameters())
        self.limit = cluster.gpu.memory_gib * 2**30

    def plan(self) -> RunPlan:
        config, cluster = self.config, self.cluster
        wanted = config.batch.max_tokens
        memory = self._memory(wanted)
        largest = self._largest_budget(wanted, memory)
        used = min(wanted, largest or wanted)
        step = self._planned(used)
        flops = step_flops(config, step.samples).total
        accumulation = len(step.micro_batches[0])
        peak = cluster.gpu.fp32_flops if self.precision == "fp32" else cluster.gpu.half_flops
        repeated = 4 / 3 if config.train.recompute else 1.0  # one more forward pass beside forward and backward (twice that)
        compute_s = repeated * flops / cluster.num_gpus / (peak * cluster.utilisation)
        traffic = communication_bytes(config, self.precision, self.parameters, cluster.num_gpus, accumulation)
        communication_s = traffic / cluster.rank_bandwidth
        step_s = compute_s + communication_s
        per_sample = self._bytes_per_sample()
        return RunPlan(
            preset=config.preset, gpu=cluster.gpu.name, num_gpus=cluster.num_gpus, precision=self.precision,
            zero_stage=config.zero.stage, offload=config.zero.offload_optimizer,
            samples=", ".join(str(store.path) for store in self.stores), parameters=self.parameters,
            memory_limit=self.limit, memory=memory, fits=memory.total <= self.limit, largest_budget=largest,
            max_tokens=used, batch_samples=step.num_samples, accumulation=accumulation, fill=step.fill,
            flops_per_step=flops, communication_bytes=traffic, bytes_per_sample=per_sample,
            read_rate=per_sample * step.num_samples / step_s, compute_s=compute_s, communication_s=communication_s,
            step_s=step_s, total_steps=config.schedule.total_steps, total_s=step_s * config.schedule.total_steps,
            bound="compute" if compute_s >= communication_s else "communication",
        )  # fmt: skip

    def _planned(self, max_tokens: int) -> PlannedStep:
        config = self.config.model_copy(update={"batch": self.config.batch.model_copy(update={"max_tokens": max_tokens})})
        return StepPlan(config, self.stores).step(0, self.cluster.num_gpus)

    def _memory(self, max_tokens: int) -> RankMemory:
        """At this budget, by the micro-batches of the first step that hold the most positions and the most padding."""
        step = self._planned(max_tokens)
        lengths = step.samples.input_lengths.sum(1)
        all_batches = [m for rank in step.micro_batches for m in rank if len(m.slots)]
        by_padding = max(all_batches, key=lambda m: len(m.slots) * int(lengths[m.slots].max()) ** 2)
        fullest = max(all_batches, key=lambda m: m.num_tokens)
        reader = SampleReader(self.config, self.stores)
        packer = Packer(self.config, self.stores[0].description.tokenizer)
        traced = [
            self.tracer.peak_bytes(packer.pack([reader.read(step.samples, int(slot)) for slot in batch.slots]))
            for batch in ([fullest] if fullest is by_padding else [fullest, by_padding])
        ]
        # Micro-batches of a step are equal, so they may be well below the budget; those of another batch size may fill it.
        full = max_tokens / fullest.num_tokens if len(step.micro_batches[0]) > 1 else 1.0
        activations = max(traced) * full
        return rank_memory(
            self.config, self.precision, self.parameters, self.cluster.num_gpus, self.cluster.device, activations
        )

    def _largest_budget(self, wanted: int, at_wanted: RankMemory) -> int:
        """The largest budget that fits: activations are nearly proportional to it, so a few traces find it."""
        model = self.config.model
        least = model.max_sequence + model.max_text_tokens + 1 + model.num_image_codes
        # More than a whole step on one rank is never used.
        most = max(least, sum(m.num_tokens for m in self._planned(wanted).micro_batches[0]))
        fits, fails = 0, most + _BUDGET_STEP  # budgets: the largest known to fit, the smallest known not to
        budget, memory = wanted, at_wanted
        for _ in range(_MOST_ROUNDS):
            if memory.total <= self.limit:
                fits = max(fits, budget)
            else:
                fails = min(fails, budget)
            growing = memory.activations * (1 + FRAGMENTATION[self.cluster.device])
            guess = budget * (self.limit - (memory.total - growing)) / growing * _AIM
            guess = int(min(guess, most) if fits < guess < fails else (fits + fails) / 2) // _BUDGET_STEP * _BUDGET_STEP
            guess = max(least, guess)
            if guess <= fits * _NEAR or guess >= fails:
                break
            budget, memory = guess, self._memory(guess)
        return fits

    def _bytes_per_sample(self) -> float:
        """Mean bytes read from the stores for one training sample."""
        total, count = 0.0, 0
        for store in self.stores:
            rows = store.rows[store.split_samples(self.config.data.train_split)]
            dims = store.description.dims
            for modality, lengths, size in (
                (TEXT, store.text_lengths, 4),
                (IMAGE, store.region_counts, 2 * dims.image_feature_dim + 7 * 4 + 2 * 2),
                (AUDIO, store.frame_counts, 2 * dims.audio_feature_dim),
            ):
                there = rows[rows[:, modality] >= 0, modality]
                total += float(lengths[there].sum(dtype=np.float64)) * size
            count += len(rows)
        return total / max(1, count) + _OTHER_BYTES


def communication_bytes(
    config: Config, precision: Precision, parameters: int, world_size: int, accumulation: int
) -> float:
    """Bytes that a rank sends in one optimiser step, by ring algorithms; gradients travel in fp32 (see deepspeed_config).

    Stage 1 reduces once a step, stages 2 and 3 on every micro-batch; stage 3 also gathers weights for forward and backward.
    """
    ring = (world_size - 1) / world_size * parameters
    weight = 4 if precision == "fp32" else 2
    stage = config.zero.stage
    if stage == 0:
        return 2 * 4 * ring
    reductions = 1 if stage == 1 else accumulation
    gathers = 2 * accumulation if stage == 3 else 1
    return ring * (4 * reductions + weight * gathers)


def plan_text(plan: RunPlan) -> str:
    """The figures as aligned lines."""
    gib = 2**30
    parts = {
        "weights": plan.memory.weights,
        "gradients": plan.memory.gradients,
        "optimiser": plan.memory.optimizer,
        "communication buffers": plan.memory.communication,
        "activations": plan.memory.activations,
        "optimiser step": plan.memory.step,
        "workspace": plan.memory.workspace,
    }
    budget = f"{plan.largest_budget:,} positions" if plan.largest_budget else "none: use a higher zero.stage, or offload"
    lines = [
        (f"{plan.preset} on {plan.num_gpus}× {plan.gpu}", f"{plan.precision}, ZeRO stage {plan.zero_stage}"
         + (", optimiser offloaded" if plan.offload else "")),
        ("samples", plan.samples),
        ("parameters", f"{plan.parameters / 1e6:.1f} million"),
        ("memory", f"{plan.memory.total / gib:.1f} of {plan.memory_limit / gib:.1f} GiB a GPU"
         + ("" if plan.fits else ": does NOT fit at this batch.max_tokens")),
        *((f"  {name}", f"{value / gib:.2f} GiB") for name, value in parts.items() if value),
        *([("  on the host", f"{plan.memory.host / gib:.2f} GiB")] if plan.memory.host else []),
        ("largest batch.max_tokens", budget),
        ("micro-batches a step", f"{plan.accumulation} of {plan.max_tokens:,} positions a GPU for {plan.batch_samples:,} "
         f"samples, {plan.fill:.0%} full"),
        ("operations a step", f"{plan.flops_per_step / 1e15:.2f} PFLOP"),
        ("sent a GPU and step", f"{plan.communication_bytes / 1e9:.2f} GB"),
        ("reading rate needed", f"{plan.read_rate / 1e6:.0f} MB/s ({plan.bytes_per_sample / 1e3:.0f} kB a sample)"),
        ("time a step", f"{plan.step_s:.2f} s ({plan.compute_s:.2f} compute + {plan.communication_s:.2f} communication)"),
        (f"time for {plan.total_steps:,} steps", f"{plan.total_s / 86400:.1f} days, bound by {plan.bound}"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def parse_cluster(cluster: Cluster) -> Cluster:
    """The same cluster, if its numbers make sense. Raises UserError otherwise."""
    if cluster.num_gpus < 1 or cluster.gpus_per_node < 1:
        raise UserError("--num-gpus and --gpus-per-node must be at least 1")
    if not 0 < cluster.utilisation <= 1:
        raise UserError(f"--utilisation {cluster.utilisation}: a share of the peak, above 0 and at most 1")
    if not 0 < cluster.network_bandwidth < math.inf:
        raise UserError(f"--network-gbit {cluster.network_bandwidth * 8 / 1e9:g}: a bandwidth above 0 in Gbit/s")
    return replace(cluster, gpus_per_node=min(cluster.gpus_per_node, cluster.num_gpus))
