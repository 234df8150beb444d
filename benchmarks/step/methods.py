"""The methods that are compared: opt_ds, and baselines in their best form. All train one model on the same samples."""

from abc import ABC, abstractmethod
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.step.accumulator import Accumulator
from benchmarks.step.baselines import MaskedBert, PaddedBert, UnpaddedBert, copy_weights, unpadded_attention
from benchmarks.step.data import MixData, StepSamples, packed_micro_batches
from benchmarks.step.work import Work
from opt_ds.data.batch import PackedBatch
from opt_ds.model.opt import OPT
from opt_ds.tasks.base import total_loss


class Method(ABC):
    """One method: its model, its optimiser, and its micro-batches of every step.

    The first step is not timed. It warms the method up, and its work is counted.
    """

    title: str

    def __init__(self, data: MixData, dtype: torch.dtype, opt: OPT, steps: list[StepSamples]) -> None:
        """Build the model with the weights of `opt` (fp32), and pack the micro-batches."""
        self.data, self.samples = data, steps
        self.model = self.build(opt, dtype).to(data.device)
        self.trained = Accumulator(self.model, data.config, dtype)
        self.steps = [[data.pack(indices) for indices in self.micro_batches(step)] for step in steps]
        self.masked = [self.contents(step).masked for step in range(len(steps))]

    @abstractmethod
    def micro_batches(self, step: StepSamples) -> list[np.ndarray]:
        """Return the sample indices of each micro-batch of a step."""

    @abstractmethod
    def build(self, opt: OPT, dtype: torch.dtype) -> nn.Module:
        """Return the model in fp32, with the weights of `opt`."""

    def summed_loss(self, batch: PackedBatch) -> torch.Tensor:
        """Return the summed cross-entropy of the masked WordPieces."""
        return self.model(batch)

    def contents(self, step: int) -> Work:
        """Return what the step's micro-batches contain."""
        work = Work()
        for batch in self.steps[step]:
            work.add_batch(batch)
        return work

    def counted_step(self) -> Work:
        """Run the first step and return its work."""
        work, model = self.contents(0), self.data.config.model
        for batch in self.steps[0]:
            work.add_run(model, partial(self._loss, batch, 0), self.trained.backward)
        self.trained.update()
        work.updates, work.parameters = 1, self.trained.num_parameters
        return work

    def micro_batch(self, step: int, number: int) -> None:
        """Run forward and backward of one micro-batch, if the step has as many."""
        batches = self.steps[step]
        if number < len(batches):
            self.trained.backward(self._loss(batches[number], step))

    def _loss(self, batch: PackedBatch, step: int) -> torch.Tensor:
        return self.summed_loss(batch) / self.masked[step]

    @torch.no_grad()
    def mean_loss(self, batch: PackedBatch) -> float:
        """Return the mean loss of the masked WordPieces without dropout."""
        self.model.eval()
        loss = float(self.summed_loss(batch))
        self.model.train()
        contents = Work()
        contents.add_batch(batch)
        return loss / contents.masked


class OptDs(Method):
    """opt_ds: packed; the last layer and the scores at masked positions only."""

    title = "opt_ds"

    def micro_batches(self, step: StepSamples) -> list[np.ndarray]:
        """Return micro-batches of equal load, distributed as in a run."""
        return packed_micro_batches(step.indices, self.data.lengths, len(step.buckets))

    def build(self, opt: OPT, dtype: torch.dtype) -> nn.Module:
        """Return `opt` itself. Parameters that masked language modelling does not use are not trained."""
        for name, parameter in opt.named_parameters():
            parameter.requires_grad_(name.startswith(("embeddings.", "encoder.", "mlm.")))
        return opt

    def summed_loss(self, batch: PackedBatch) -> torch.Tensor:
        """Return the total loss of a run, whose only term is the summed cross-entropy."""
        return total_loss(self.model(batch), {"mlm": 1.0}, self.data.config.tasks, 1)


class HuggingFace(Method):
    """transformers' BERT without padding, in the micro-batches of opt_ds."""

    title = "Hugging Face, unpadded"

    def micro_batches(self, step: StepSamples) -> list[np.ndarray]:
        """Return micro-batches of equal load, distributed as in a run of opt_ds."""
        return packed_micro_batches(step.indices, self.data.lengths, len(step.buckets))

    def build(self, opt: OPT, dtype: torch.dtype) -> nn.Module:
        """Return the unpadded baseline."""
        return _with_weights(opt, UnpaddedBert(opt.config, unpadded_attention(self.data.device, dtype)))


class Uniter(Method):
    """transformers' BERT as UNITER trains: buckets of similar length, padded."""

    title = "UNITER's buckets, padded"

    def micro_batches(self, step: StepSamples) -> list[np.ndarray]:
        """Return the buckets."""
        return step.buckets

    def build(self, opt: OPT, dtype: torch.dtype) -> nn.Module:
        """Return the padded baseline."""
        return _with_weights(opt, PaddedBert(opt.config, "sdpa"))


class HuggingFacePadded(Uniter):
    """transformers' BERT on random samples, padded to the longest. It shows what padding costs."""

    title = "Hugging Face, random samples, padded"

    def micro_batches(self, step: StepSamples) -> list[np.ndarray]:
        """Return micro-batches of random samples."""
        return step.random()


def _with_weights(opt: OPT, model: MaskedBert) -> MaskedBert:
    copy_weights(opt, model)
    return model


OURS = "ours"
BASELINES: dict[str, type[Method]] = {"hf": HuggingFace, "uniter": Uniter, "hf_padded": HuggingFacePadded}
