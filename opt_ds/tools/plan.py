"""Requirements of a run, estimated before it starts.

They are memory, micro-batch budget, accumulation, operations, traffic, time and bottleneck.

Memory comes from the model in `memory.py`, which tests compare with measured CPU peaks. Nothing of this has been
measured on GPUs. Times are computed: operations divided by the data sheet's peak times `utilisation`, bytes divided by
the link's rate times `link_efficiency`.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np

from opt_ds.config import Config
from opt_ds.data.batch import Packer
from opt_ds.data.flops import step_flops
from opt_ds.data.modality import modalities_of
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.data.step_plan import StepPlan
from opt_ds.data.step_samples import select
from opt_ds.data.store_rows import store_rows
from opt_ds.errors import UserError
from opt_ds.store.reader import FeatureStore
from opt_ds.tools.activations import ActivationTracer
from opt_ds.tools.assumed_store import AssumedStore
from opt_ds.tools.memory import FRAGMENTATION, RankMemory, rank_memory
from opt_ds.training.deepspeed_config import Hardware, Precision, choose_precision
from opt_ds.training.hardware import Gpu

_BUDGET_STEP = 256  # budgets are multiples of this
_MOST_ROUNDS = 6  # maximum number of traces in the search for the largest budget
_AIM, _NEAR = 0.99, 1.02  # target below the limit, and tolerance; micro-batches differ in their padding
_OTHER_BYTES = 64 * 2 + 8  # image codes and the sample's own numbers


@dataclass(frozen=True)
class Cluster:
    """The machine of the estimate. `network_bandwidth` is per node, in bytes per second, one direction."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8
    network_bandwidth: float = 100e9 / 8
    utilisation: float = 0.35
    link_efficiency: float = 0.6

    @property
    def device(self) -> str:
        """Kind of device: "cpu" or "cuda"."""
        return "cpu" if self.gpu.name == "cpu" else "cuda"

    @property
    def hardware(self) -> Hardware:
        """The rank's hardware, for the choice of the precision."""
        if self.device == "cpu":
            return Hardware("cpu", self.gpu.name)
        return Hardware("cuda", self.gpu.name, self.gpu.capability, (f"sm_{self.gpu.capability[0]}{self.gpu.capability[1]}",))

    @property
    def rank_bandwidth(self) -> float:
        """Bytes per second that a rank exchanges with others.

        With several nodes, this is its part of the network's bandwidth.
        """
        link = self.gpu.link_bandwidth
        if self.num_gpus > self.gpus_per_node:
            link = min(link, self.network_bandwidth / self.gpus_per_node)
        return link * self.link_efficiency


@dataclass(frozen=True)
class RunEstimate:
    """All figures: memory in bytes per rank, times in seconds, traffic in bytes per rank and step."""

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
    largest_budget: int  # the largest batch.max_tokens that fits, or 0
    max_tokens: int  # basis of the figures below: batch.max_tokens, or the largest budget if that is smaller
    batch_samples: int
    accumulation: int
    first_pass: int  # micro-batches per step and rank that are run twice (see `opt_ds.tasks.global_loss`)
    packing_efficiency: float  # positions used, as a fraction of the micro-batches' budget
    flops_per_step: float
    communication_bytes: float
    bytes_per_sample: float
    read_rate: float  # bytes per second over all ranks that keep the GPUs busy
    compute_s: float
    communication_s: float
    step_s: float
    total_steps: int
    total_s: float
    bound: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the total memory.

        `fill` is the former name of `packing_efficiency`; it goes with the next release.
        """
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**asdict(self), "memory": memory, "fill": self.packing_efficiency}


def estimate_run(config: Config, cluster: Cluster, stores: list[FeatureStore] | AssumedStore) -> RunEstimate:
    """Return the requirements of a run on a cluster.

    Raise UserError for a precision that the GPU or DeepSpeed does not support.
    """
    return _Planner(config, cluster, stores).plan()


class _Planner:
    def __init__(self, config: Config, cluster: Cluster, stores: list[FeatureStore] | AssumedStore) -> None:
        self.precision = choose_precision(config, cluster.hardware)
        self.config, self.cluster = config, cluster
        self.stores = stores if isinstance(stores, list) else cast(list[FeatureStore], [stores])
        self.tracer = ActivationTracer(config, self.precision, cluster.device)
        self.parameters = sum(p.numel() for p in self.tracer.model.parameters())
        self.limit = cluster.gpu.memory_gib * 2**30

    def plan(self) -> RunEstimate:
        config, cluster = self.config, self.cluster
        wanted = config.batch.max_tokens
        memory = self._memory(wanted)
        largest = self._largest_budget(wanted, memory)
        used = min(wanted, largest or wanted)
        step = self._step_plan(used)
        flops = step_flops(config, step.samples).total
        accumulation = len(step.micro_batches[0])
        peak = cluster.gpu.fp32_flops if self.precision == "fp32" else cluster.gpu.half_flops
        # One more forward pass in addition to forward and backward (which takes twice as long).
        repeated = 4 / 3 if config.train.recompute else 1.0
        operations = repeated * flops + self._first_pass_flops(step)
        compute_s = operations / cluster.num_gpus / (peak * cluster.utilisation)
        traffic = communication_bytes(
            config, self.precision, self.parameters, cluster.num_gpus, accumulation, step.first_pass
        )
        communication_s = traffic / cluster.rank_bandwidth
        step_s = compute_s + communication_s
        per_sample = self._bytes_per_sample()
        return RunEstimate(
            preset=config.preset, gpu=cluster.gpu.name, num_gpus=cluster.num_gpus, precision=self.precision,
            zero_stage=config.zero.stage, offload=config.zero.offload_optimizer,
            samples=", ".join(str(store.path) for store in self.stores), parameters=self.parameters,
            memory_limit=self.limit, memory=memory, fits=memory.total <= self.limit, largest_budget=largest,
            max_tokens=used, batch_samples=step.num_samples, accumulation=accumulation,
            first_pass=step.first_pass, packing_efficiency=step.packing_efficiency,
            flops_per_step=flops, communication_bytes=traffic, bytes_per_sample=per_sample,
            read_rate=per_sample * step.num_samples / step_s, compute_s=compute_s, communication_s=communication_s,
            step_s=step_s, total_steps=config.schedule.total_steps, total_s=step_s * config.schedule.total_steps,
            bound="compute" if compute_s >= communication_s else "communication",
        )  # fmt: skip

    def _step_plan(self, max_tokens: int) -> StepPlan:
        config = self.config.model_copy(update={"batch": self.config.batch.model_copy(update={"max_tokens": max_tokens})})
        return PretrainingPlan(config, self.stores).step(0, self.cluster.num_gpus)

    def _first_pass_flops(self, step: StepPlan) -> float:
        """Return the forward operations of the micro-batches that are run twice, over all ranks."""
        first = [m.indices for rank in step.micro_batches for m in rank[: step.first_pass]]
        return step_flops(self.config, select(step.samples, np.concatenate(first))).forward if first else 0.0

    def _memory(self, max_tokens: int) -> RankMemory:
        """Return the memory at this budget.

        It is traced with the micro-batches of the first step that have the most positions and the most padding.
        """
        step = self._step_plan(max_tokens)
        lengths = step.samples.input_lengths.sum(1)
        all_batches = [m for rank in step.micro_batches for m in rank if len(m.indices)]
        by_padding = max(all_batches, key=lambda m: len(m.indices) * int(lengths[m.indices].max()) ** 2)
        fullest = max(all_batches, key=lambda m: m.num_tokens)
        reader = SampleReader(self.config, self.stores)
        packer = Packer(self.config, self.stores[0].description.tokenizer)
        traced = [
            self.tracer.peak_bytes(packer.pack([reader.read(step.samples, int(index)) for index in batch.indices]))
            for batch in ([fullest] if fullest is by_padding else [fullest, by_padding])
        ]
        # A step's micro-batches are balanced, so they may be well below the budget. Those of another batch size may
        # fill it.
        full = max_tokens / fullest.num_tokens if len(step.micro_batches[0]) > 1 else 1.0
        activations = max(traced) * full
        return rank_memory(
            self.config, self.precision, self.parameters, self.cluster.num_gpus, self.cluster.device, activations
        )

    def _largest_budget(self, wanted: int, at_wanted: RankMemory) -> int:
        """Return the largest budget that fits. Activations are nearly proportional to it, so a few traces find it."""
        least = self.config.least_max_tokens
        # A budget larger than a complete step on one rank is never used.
        most = max(least, sum(m.num_tokens for m in self._step_plan(wanted).micro_batches[0]))
        fits, fails = 0, most + _BUDGET_STEP  # the largest budget known to fit, and the smallest known not to fit
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
        """Return the mean number of bytes read from the stores per training sample."""
        total, count = 0.0, 0
        modalities = modalities_of(self.config.model)
        for store in self.stores:
            rows = store_rows(store, store.split_samples(self.config.data.train_split), modalities)
            for modality in modalities:
                there = rows[rows[:, modality.number] >= 0, modality.number]
                items = float(store.lengths(modality.name)[there].sum(dtype=np.float64))
                total += items * modality.stored_bytes(store.description.dims)
            count += len(rows)
        return total / max(1, count) + _OTHER_BYTES


def communication_bytes(
    config: Config, precision: Precision, parameters: int, world_size: int, accumulation: int, first_pass: int = 0
) -> float:
    """Return the bytes that a rank sends in one optimiser step.

    Collectives are assumed to be ring algorithms, with gradients in fp32 (see deepspeed_config).

    Stage 1 reduces once per step, stages 2 and 3 on every micro-batch. Stage 3 also gathers weights for forward and
    backward.

    Args:
        config: The run's configuration.
        precision: The run's precision.
        parameters: Parameters of the model.
        world_size: Number of ranks.
        accumulation: Micro-batches per step and rank.
        first_pass: Those of them that are run twice. The first time is a forward pass alone.

    Returns:
        Bytes.
    """
    ring = (world_size - 1) / world_size * parameters
    weight = 4 if precision == "fp32" else 2
    stage = config.zero.stage
    if stage == 0:
        return 2 * 4 * ring
    reductions = 1 if stage == 1 else accumulation
    gathers = 2 * accumulation + first_pass if stage == 3 else 1
    return ring * (4 * reductions + weight * gathers)


def estimate_text(plan: RunEstimate) -> str:
    """Return the figures as aligned lines."""
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
    twice = f" ({plan.first_pass} of them run twice)" if plan.first_pass else ""
    budget = f"{plan.largest_budget:,} positions" if plan.largest_budget else "none: use a higher zero.stage, or offload"
    lines = [
        (f"{plan.preset} on {plan.num_gpus}× {plan.gpu}", f"{plan.precision}, ZeRO stage {plan.zero_stage}"
         + (", optimiser offloaded" if plan.offload else "")),
        ("samples", plan.samples),
        ("parameters", f"{plan.parameters / 1e6:.1f} million"),
        ("memory", f"{plan.memory.total / gib:.1f} of {plan.memory_limit / gib:.1f} GiB per GPU"
         + ("" if plan.fits else ": does NOT fit at this batch.max_tokens")),
        *((f"  {name}", f"{value / gib:.2f} GiB") for name, value in parts.items() if value),
        *([("  on the host", f"{plan.memory.host / gib:.2f} GiB")] if plan.memory.host else []),
        ("largest batch.max_tokens", budget),
        ("micro-batches per step", f"{plan.accumulation}{twice} of {plan.max_tokens:,} positions per GPU for "
         f"{plan.batch_samples:,} samples, packing efficiency {plan.packing_efficiency:.0%}"),
        ("operations per step", f"{plan.flops_per_step / 1e15:.2f} PFLOP"),
        ("traffic per GPU and step", f"{plan.communication_bytes / 1e9:.2f} GB"),
        ("reading rate needed", f"{plan.read_rate / 1e6:.0f} MB/s ({plan.bytes_per_sample / 1e3:.0f} kB per sample)"),
        ("time per step", f"{plan.step_s:.2f} s ({plan.compute_s:.2f} compute + {plan.communication_s:.2f} communication)"),
        (f"time for {plan.total_steps:,} steps", f"{plan.total_s / 86400:.1f} days, bound by {plan.bound}"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def parse_cluster(cluster: Cluster) -> Cluster:
    """Return the cluster after checking its numbers. Raise UserError if they make no sense."""
    if cluster.num_gpus < 1 or cluster.gpus_per_node < 1:
        raise UserError("--num-gpus and --gpus-per-node must be at least 1")
    if not 0 < cluster.utilisation <= 1:
        raise UserError(f"--utilisation {cluster.utilisation}: a fraction of the peak, above 0 and at most 1")
    if not 0 < cluster.network_bandwidth < math.inf:
        raise UserError(f"--network-gbit {cluster.network_bandwidth * 8 / 1e9:g}: a bandwidth above 0 in Gbit/s")
    return replace(cluster, gpus_per_node=min(cluster.gpus_per_node, cluster.num_gpus))
