"""Memory of a micro-batch's forward and backward pass, found by running the real model on meta tensors.

Nothing is computed. Tensors on PyTorch's "meta" device have only shapes and dtypes, and what a real device would
allocate is added up, operator by operator. The model behaves as on that device. Differences in allocation are corrected
(dropout's masks take one byte per element on a GPU).
"""

import weakref
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from opt_ds.config import Config
from opt_ds.data.batch import PackedBatch
from opt_ds.model.opt import OPT
from opt_ds.ops.dropout import acting_as
from opt_ds.ops.movable import map_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are created while entered and still referenced, and their maximum."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._on_gpu = device == "cuda"
        self._alignment = 512 if self._on_gpu else 64  # granularity of the allocator
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._on_gpu and func is torch.ops.aten.bernoulli_.float:
            self._resize(result, result.numel())
        else:
            tree_map_only(torch.Tensor, self._note, result)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            self._references[key] = weakref.ref(storage, lambda _: self._free(key))
            self._resize(tensor, storage.nbytes())

    def _resize(self, tensor: torch.Tensor, num_bytes: int) -> None:
        key = tensor.untyped_storage()._cdata
        size = -(-num_bytes // self._alignment) * self._alignment
        self.live += size - self._sizes[key]
        self._sizes[key] = size

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        del self._references[key]


class ActivationTracer:
    """Traces micro-batches through one model as on `device` ("cpu" or "cuda")."""

    def __init__(self, config: Config, precision: str, device: str) -> None:
        self._device = device
        with torch.device("meta"):
            model = OPT(config.model, config.tasks).recompute_layers(config.train.recompute).train()
        self.model = model.to(DTYPES[precision])
        # The word embedding is used three times. PyTorch accumulates its gradients in place, from the start of backward
        # to its end. Meta tensors would be copied, so this gradient is excluded from the trace and added to the result.
        self._word = self.model.embeddings.word.weight
        self._traced = [parameter for parameter in self.model.parameters() if parameter is not self._word]
        for parameter in self._traced:  # the engine takes each gradient as soon as it is computed
            parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def peak_bytes(self, batch: PackedBatch) -> int:
        """Return the peak memory in bytes, from the arrival of the batch to the end of backward.

        Weights and accumulated gradients are not included.
        """
        counter = LiveBytes(self._device)
        with counter, acting_as(self._device):
            on_device = map_tensors(batch, partial(torch.empty_like, device="meta"))
            terms = self.model(on_device)
            total = sum(term.sum for term in terms.values())
            assert isinstance(total, torch.Tensor)
            total.backward(inputs=self._traced)
        return counter.peak + self._word.numel() * self._word.element_size()


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
