"""Measure a training step on this machine: opt_ds, baselines, and the loop of opt_ds without DeepSpeed.

    python benchmarks/train_step.py [--precision fp32 bf16] [--mix long emoji] [--device cuda --times 8] [--output FILE.json]

All models have `opt-base`'s width (768, 12 heads, FFN 3,072), 4 layers, a vocabulary of 30,522, dropout 0.1, the same
embedders of regions and frames, the same samples and masks, fp32 accumulation of gradients and one fused AdamW:

    hf       transformers' BertForMaskedLM (SDPA), random batches, padded; the vocabulary's scores at every position
    uniter   transformers' BertModel (SDPA) as UNITER trains: buckets of equal length, padded; scores at masked positions only
    ours     packed; scores at masked positions only

They take turns micro-batch by micro-batch, each after a step of other micro-batches. A step is 8 of them and an update.
`engine` is a complete optimiser step of opt_ds (all tasks, DeepSpeed stage 1, one rank, 8 micro-batches). It is
compared with `loop`, the same model and micro-batches in a plain PyTorch loop. Tokens are positions with content.
Utilisation is the number of needed operations (opt_ds/data/flops.py: without padding and unused positions), relative to
a large matrix product timed in the same turns. `--times` enlarges the micro-batches, so that they occupy a GPU.
`--backend` chooses the operators there.
"""

import argparse
import statistics
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from benchmarks.measure import CLOCKS, interleaved, machine, matmul, median_ratio, print_table, write_result  # noqa: E402
from opt_ds.config import Config, load_config  # noqa: E402
from opt_ds.data.batch import PackedBatch, Packer  # noqa: E402
from opt_ds.data.flops import step_flops  # noqa: E402
from opt_ds.data.pretraining_plan import PretrainingPlan  # noqa: E402
from opt_ds.data.samples import SampleReader  # noqa: E402
from opt_ds.data.step_plan import StepPlan  # noqa: E402
from opt_ds.data.step_samples import select  # noqa: E402
from opt_ds.model.embeddings import InputEmbeddings  # noqa: E402
from opt_ds.model.opt import OPT  # noqa: E402
from opt_ds.ops import backend  # noqa: E402
from opt_ds.store.reader import FeatureStore  # noqa: E402
from opt_ds.store.synthetic import write_synthetic_store  # noqa: E402
from opt_ds.tasks.base import total_loss  # noqa: E402
from opt_ds.tasks.mlm import MaskedTokens  # noqa: E402
from opt_ds.training.deepspeed_config import Precision  # noqa: E402
from opt_ds.training.distributed import ProcessGroup, find_ranks  # noqa: E402
from opt_ds.training.gradients import add_to_sums  # noqa: E402
from opt_ds.training.host_memory import keep_few_primitives, keep_freed_memory  # noqa: E402
from opt_ds.training.trainer import parameter_groups  # noqa: E402

ACCUMULATION = 8
POOL = 32  # number of micro-batches whose samples UNITER's buckets sort
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Mix:
    """Lengths of the samples, and samples per micro-batch."""

    text: tuple[int, int]
    regions: tuple[int, int]
    frames: tuple[int, int]  # before stacking
    samples: int
    model: tuple[str, ...] = ()


MIXES = {
    # 46–190 items, like narratives over detected regions
    "long": Mix((6, 54), (10, 56), (30, 80), 16),
    # names of emoji: a few words, 16 grid cells, 8 stacked log-mel frames
    "emoji": Mix((2, 9), (16, 16), (70, 200), 40,
                 ("model.image_feature_dim=1280", "model.audio_feature_dim=80", "model.audio_stack=8", "model.max_regions=16")),
}  # fmt: skip


class MixData:
    """A synthetic store of a mix, and the micro-batches that each method makes of its samples."""

    def __init__(self, folder: Path, mix: Mix, settings: list[str], device: torch.device) -> None:
        self.device = device
        longest = 2 + mix.text[1] + mix.regions[1] + mix.frames[1]
        self.config = load_config("opt-base", [
            "model.num_layers=4", "model.text_decoder_layers=1", "model.image_decoder_layers=1",
            f"batch.size={POOL * mix.samples}", f"batch.max_tokens={100 * longest}", "train.image_grid=0",
            f"data.stores=[{folder}]", *mix.model, *settings,
        ])  # fmt: skip
        model = self.config.model
        if not folder.exists():
            write_synthetic_store(
                folder, int(POOL * mix.samples * 1.25) + 8, text_len=mix.text, regions=mix.regions, frames=mix.frames,
                image_feature_dim=model.image_feature_dim, audio_feature_dim=model.audio_feature_dim,
                image_num_classes=model.image_num_classes, vocab_size=model.vocab_size,
                num_codes_vocab=model.image_codebook_size, pixels=False,
            )  # fmt: skip
        self.stores = [FeatureStore(folder)]
        self.step_plan = PretrainingPlan(self.config, self.stores).step(0)
        self.lengths = (2 + self.step_plan.samples.input_lengths.sum(1)).astype(np.int64)
        self._reader = SampleReader(self.config, self.stores)
        self._packer = Packer(self.config, self.stores[0].description.tokenizer)

    def pack(self, indices: np.ndarray) -> PackedBatch:
        batch = self._packer.pack([self._reader.read(self.step_plan.samples, int(index)) for index in indices])
        return batch.to(self.device)

    def flops(self, indices: np.ndarray) -> float:
        """Return the needed operations of a forward and backward pass on these samples."""
        return step_flops(self.config, select(self.step_plan.samples, indices)).total

    def tokens(self, indices: np.ndarray) -> int:
        return int(self.lengths[indices].sum())


class Accumulator:
    """Accumulates gradients in fp32, clips them, and runs one fused AdamW on fp32 masters, as DeepSpeed does."""

    def __init__(self, model: nn.Module, config: Config, dtype: torch.dtype) -> None:
        self.model, self.clip_norm = model.to(dtype).train(), config.optimizer.clip_norm
        self.weights = list(model.parameters())
        masters = {p: p if dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.weights}
        self.masters = [masters[p] for p in self.weights]
        self._half = dtype != torch.float32
        groups = parameter_groups(model, config.optimizer.weight_decay)
        for group in groups:
            group["params"] = [masters[p] for p in group["params"]]
        self._adam = torch.optim.AdamW(groups, lr=1e-5, betas=config.optimizer.betas, fused=True)
        self.sums = [torch.zeros_like(master) for master in self.masters]
        for master, total in zip(self.masters, self.sums, strict=True):
            master.grad = total

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        if self._half:
            pairs = [(s, p.grad) for s, p in zip(self.sums, self.weights, strict=True) if p.grad is not None]
            add_to_sums([total for total, _ in pairs], [half for _, half in pairs])
            for p in self.weights:
                p.grad = None

    @torch.no_grad()
    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.masters, self.clip_norm, foreach=True)
        self._adam.step()
        torch._foreach_zero_(self.sums)
        if self._half:
            torch._foreach_copy_(list[torch.Tensor](self.weights), list[torch.Tensor](self.masters))


class Contender(ABC):
    """One method of training: its model, and the micro-batches that it makes of the samples."""

    def __init__(self, data: MixData, dtype: torch.dtype) -> None:
        self.data, self.indices = data, self.micro_batches(data)
        torch.manual_seed(1)
        self.batches = [data.pack(indices) for indices in self.indices[:ACCUMULATION]]
        self.trained = Accumulator(self.build(data.config).to(data.device), data.config, dtype)

    def warm_up(self) -> None:
        """Run a step of other micro-batches, which is not timed. Code for their shapes is cached, code for the timed
        ones is not.
        """
        for indices in self.indices[ACCUMULATION : 2 * ACCUMULATION]:
            self.trained.backward(self.loss(self.data.pack(indices)))
        self.trained.update()

    @abstractmethod
    def micro_batches(self, data: MixData) -> list[np.ndarray]:
        """Return the global sample indices of each micro-batch."""

    @abstractmethod
    def build(self, config: Config) -> nn.Module:
        """Return the model, in fp32."""

    @abstractmethod
    def loss(self, batch: PackedBatch) -> torch.Tensor:
        """Return the inputs of one micro-batch."""

    def micro_batch(self, repeat: int) -> None:
        """Run forward and backward of one micro-batch."""
        self.trained.backward(self.loss(self.batches[repeat % len(self.batches)]))

    def update(self, _: int) -> None:
        self.trained.update()


class Ours(Contender):
    def micro_batches(self, data: MixData) -> list[np.ndarray]:
        return data_of_plan(data, POOL)

    def build(self, config: Config) -> nn.Module:
        return OPT(config.model, config.tasks)

    def loss(self, batch: PackedBatch) -> torch.Tensor:
        return total_loss(self.trained.model(batch), self.data.step_plan.counts, self.data.config.tasks, 1)


def data_of_plan(data: MixData, rounds: int) -> list[np.ndarray]:
    """Return the plan's samples in `count` micro-batches of equal load, distributed as in a run."""
    from opt_ds.data.micro_batches import distribute

    budget = int(data.lengths.sum() / rounds * 1.01) + 1
    return [m.indices for m in distribute(np.arange(len(data.lengths)), data.lengths, 1, budget)[0]]


class PaddedBert(nn.Module):
    """transformers' BERT on the rows of opt_ds's embedders, padded, with scores at masked positions or at all."""

    def __init__(self, config: Config, everywhere: bool) -> None:
        from transformers import BertConfig, BertForMaskedLM

        super().__init__()
        model = config.model
        self.embeddings, self.everywhere = InputEmbeddings(model), everywhere
        self.bert = BertForMaskedLM._from_config(
            BertConfig(
                vocab_size=model.vocab_size, hidden_size=model.hidden_size, num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_heads, intermediate_size=model.ffn_size, hidden_dropout_prob=model.dropout,
                attention_probs_dropout_prob=model.attention_dropout,
            ),
            attn_implementation="sdpa",
        )  # fmt: skip
        self.bert.set_input_embeddings(self.embeddings.word)  # one table for words and scores, as ours
        self.bert.tie_weights()

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        sequences, masked = batch.inputs.sequences, batch.parts["mlm"]
        assert isinstance(masked, MaskedTokens)
        rows_ble = sequences.pad(self.embeddings(batch.inputs)[0])
        valid_bl = sequences.valid.long()
        places = sequences.place_of_row[masked.index]
        if self.everywhere:
            labels = torch.full((valid_bl.numel(),), -100, device=places.device).index_copy_(0, places, masked.targets)
            return self.bert(inputs_embeds=rows_ble, attention_mask=valid_bl, labels=labels.view_as(valid_bl)).loss
        hidden_ble = self.bert.bert(inputs_embeds=rows_ble, attention_mask=valid_bl).last_hidden_state
        scores = self.bert.cls(hidden_ble.flatten(0, 1).index_select(0, places))
        return F.cross_entropy(scores.float(), masked.targets)


class HuggingFace(Contender):
    everywhere = True

    def micro_batches(self, data: MixData) -> list[np.ndarray]:
        return np.array_split(np.arange(len(data.lengths)), POOL)

    def build(self, config: Config) -> nn.Module:
        return PaddedBert(config, self.everywhere)

    def loss(self, batch: PackedBatch) -> torch.Tensor:
        return self.trained.model(batch)


class Uniter(HuggingFace):
    everywhere = False

    def micro_batches(self, data: MixData) -> list[np.ndarray]:
        """Sort by length, split where the padded positions reach the others' number of positions, and shuffle."""
        budget = data.lengths.sum() / POOL
        batches: list[np.ndarray] = []
        current: list[int] = []
        for index in np.argsort(data.lengths, kind="stable"):
            if current and data.lengths[index] * (len(current) + 1) > budget:
                batches.append(np.array(current))
                current = []
            current.append(index)
        batches.append(np.array(current))
        order = np.random.default_rng(1).permutation(len(batches))
        return [batches[k] for k in order]


PEERS: dict[str, type[Contender]] = {"hf": HuggingFace, "uniter": Uniter, "ours": Ours}


def compare_peers(
    folder: Path, mix: Mix, precision: str, repeats: int, clock: str, settings: list[str], device: torch.device
) -> dict[str, Any]:
    """Measure masked language modelling by all methods: tokens per second and utilisation of the matmul peak."""
    data = MixData(folder, mix, ["tasks.sampling_weights={mlm: 1}", *settings], device)
    built = {name: kind(data, DTYPES[precision]) for name, kind in PEERS.items()}
    for contender in built.values():
        contender.warm_up()
    product, product_flops = matmul(DTYPES[precision], device)
    calls: dict[str, Callable[[int], object]] = {name: contender.micro_batch for name, contender in built.items()}
    calls |= {"matmul": product} | {f"{name} update": contender.update for name, contender in built.items()}
    seconds = interleaved(calls, repeats, clock, device)
    peaks = [product_flops / s for s in seconds["matmul"]]
    figures: dict[str, Any] = {"peak_gflops": statistics.median(peaks) / 1e9}
    for name, contender in built.items():
        indices = [contender.indices[k % ACCUMULATION] for k in range(repeats)]
        update = statistics.median(seconds[f"{name} update"]) / ACCUMULATION
        times = [s + update for s in seconds[name]]
        rates = [data.tokens(own) / s for own, s in zip(indices, times, strict=True)]
        padded = sum(len(own) * data.lengths[own].max() for own in indices)
        figures[name] = {
            "tokens_per_s": statistics.median(rates),
            "seconds_per_micro_batch": statistics.median(times),
            "fill": 1.0 if name == "ours" else sum(map(data.tokens, indices)) / padded,
            "utilisation": statistics.median(
                data.flops(own) / s / peak for own, s, peak in zip(indices, times, peaks, strict=True)
            ),
        }
        figures[name]["rates"] = rates
    for name in ("hf", "uniter"):
        figures[f"ours_over_{name}"] = median_ratio(figures["ours"]["rates"], figures[name]["rates"])
    return figures


@cache
def this_rank() -> ProcessGroup:
    """Return this process as the only rank. It joins once, because DeepSpeed keeps the first group that it sees."""
    return ProcessGroup(find_ranks())


def compare_engine(
    folder: Path, mix: Mix, precision: Precision, repeats: int, clock: str, settings: list[str], device: torch.device
) -> dict[str, Any]:
    """Compare a complete optimiser step of all tasks under DeepSpeed with the same in a plain loop."""
    from opt_ds.training.deepspeed_config import Hardware
    from opt_ds.training.signals import StopRequest
    from opt_ds.training.trainer import Trainer

    data = MixData(folder, mix, [f"batch.size={ACCUMULATION * mix.samples}", "guard.spike_zscore=0", *settings], device)
    indices = data_of_plan(data, ACCUMULATION)
    batches = [data.pack(own) for own in indices]
    config = data.config
    torch.manual_seed(1)
    loop = Accumulator(OPT(config.model, config.tasks).to(device), config, DTYPES[precision])

    def loop_step(_: int) -> float:
        total = torch.zeros((), device=device)
        for k, batch in enumerate(batches):
            backend.seed_dropout(1, 0, 0, k)
            loss = total_loss(loop.model(batch), data.step_plan.counts, config.tasks, 1)
            loop.backward(loss)
            total += loss.detach()
        loop.update()
        return float(total)

    with tempfile.TemporaryDirectory() as output, StopRequest("SIGUSR1") as stop:
        trainer = Trainer(config, data.stores, Path(output), this_rank(), Hardware.detect(), precision, None, stop)
        trainer.engine.train()
        step_plan = _with_micro_batches(data.step_plan, indices, data.lengths)

        def engine_step(_: int) -> None:
            trainer.stepper.take(step_plan, iter(batches))

        product, product_flops = matmul(DTYPES[precision], device)
        seconds = interleaved({"loop": loop_step, "matmul": product, "engine": engine_step}, repeats, clock, device)
        trainer.close()
    peaks = [product_flops / s for s in seconds["matmul"]]
    flops = data.flops(np.arange(len(data.lengths)))
    return {
        "peak_gflops": statistics.median(peaks) / 1e9,
        "positions": sum(batch.num_tokens for batch in batches),
        "engine_over_loop": median_ratio(seconds["engine"], seconds["loop"]),
        **{
            name: {
                "seconds_per_step": statistics.median(seconds[name]),
                "tokens_per_s": sum(batch.num_tokens for batch in batches) / statistics.median(seconds[name]),
                "utilisation": statistics.median(
                    flops / s / peak for s, peak in zip(seconds[name], peaks, strict=True)
                ),
                "seconds": seconds[name],
            }
            for name in ("loop", "engine")
        },
    }


def _with_micro_batches(step_plan: StepPlan, indices: list[np.ndarray], lengths: np.ndarray) -> StepPlan:
    import dataclasses

    from opt_ds.data.micro_batches import MicroBatchPlan

    totals = [int(lengths[own].sum()) for own in indices]
    micro_batches = [MicroBatchPlan(own, total, float(total)) for own, total in zip(indices, totals, strict=True)]
    return dataclasses.replace(step_plan, micro_batches=[micro_batches])


def report(name: str, precision: str, peers: dict[str, Any] | None, engine: dict[str, Any] | None) -> None:
    if peers:
        print(f"\n{name} mix, {precision}, masked language modelling; matmul {peers['peak_gflops']:.0f} GFLOP/s\n")
        print_table(
            ["", "tokens/s", "fill", "needed operations over the matmul peak", "ours is faster by"],
            [
                [key, f"{peers[key]['tokens_per_s']:.0f}", f"{peers[key]['fill']:.0%}", f"{peers[key]['utilisation']:.0%}",
                 f"{peers[f'ours_over_{key}']:.2f}" if f"ours_over_{key}" in peers else ""]
                for key in PEERS
            ],
        )  # fmt: skip
    if engine:
        print(
            f"\n{name} mix, {precision}, all tasks, {engine['positions']} positions in {ACCUMULATION} micro-batches\n"
        )
        print_table(
            ["", "seconds per step", "tokens/s", "utilisation of the matmul peak", "time relative to the loop"],
            [
                [key, f"{engine[key]['seconds_per_step']:.2f}", f"{engine[key]['tokens_per_s']:.0f}",
                 f"{engine[key]['utilisation']:.0%}", f"{engine['engine_over_loop']:.3f}" if key == "engine" else ""]
                for key in ("loop", "engine")
            ],
        )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time of a training step: opt_ds, baselines, and the overhead of DeepSpeed."
    )
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--mix", nargs="+", choices=list(MIXES), default=list(MIXES))
    parser.add_argument("--part", nargs="+", choices=["peers", "engine"], default=["peers", "engine"])
    parser.add_argument("--repeats", type=int, default=8, help="number of turns; at least 5")
    parser.add_argument("--threads", type=int, help="number of threads. Default: PyTorch's")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="wall, or cpu (with --threads 1) if other programs use the cores",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--times", type=int, default=1, help="factor on the number of samples per micro-batch")
    parser.add_argument("--backend", default="auto", help="backend of the operators: auto, fused or torch")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.PATH=VALUE", dest="settings")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    most = "bf16" if "bf16" in arguments.precision else "fp32"
    print(
        f"freed memory: {keep_freed_memory(device.type)}; oneDNN's primitives kept: {keep_few_primitives(device.type, most)}"
    )
    print(f"operators: {backend.choose(arguments.backend, device)}")
    result: dict[str, Any] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
    print(result["machine"])
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.mix:
            for precision in arguments.precision:
                mix = replace(MIXES[name], samples=MIXES[name].samples * arguments.times)
                settings = [f"ops.backend={arguments.backend}", *arguments.settings]
                common = (Path(folder) / name, mix, precision, arguments.repeats, arguments.clock, settings, device)
                peers = compare_peers(*common) if "peers" in arguments.part else None
                engine = compare_engine(*common) if "engine" in arguments.part else None
                report(name, precision, peers, engine)
                result[f"{name} {precision}"] = {"peers": peers, "engine": engine}
    write_result(arguments.output, result)
    if "engine" in arguments.part:
        this_rank().close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
