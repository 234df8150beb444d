"""Measure generation with the decoders: captions and images per second, with and without the cache of keys and values.

    python benchmarks/generate.py [--config opt-emoji] [--batch 1 16] [--repeats 5] [--device cpu] [--output generate.json]

Random weights are as fast as trained ones. Every sequence has full length. The baseline has no cache: the complete
prefix goes through the decoder for each new item. Both generate the same items, which is checked. They take turns.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.measure import interleaved, machine, median_ratio, print_table, write_result  # noqa: E402
from opt_ds.config import load_config  # noqa: E402
from opt_ds.model.decoders import ImageDecoder  # noqa: E402
from opt_ds.model.generation import DecodingConfig, write  # noqa: E402
from opt_ds.model.opt import OPT  # noqa: E402
from opt_ds.nn.autoregressive import AutoregressiveDecoder  # noqa: E402
from opt_ds.nn.inputs import DecoderBatch  # noqa: E402
from opt_ds.ops import backend  # noqa: E402
from opt_ds.ops.sequences import Sequences  # noqa: E402


class Writing:
    """Return decoder inputs for a number of sequences, each over a random encoder output of 40 positions."""

    def __init__(self, decoder: AutoregressiveDecoder, batch: int, width: int, device: torch.device) -> None:
        self.decoder, self.batch, self.device = decoder, batch, device
        self.begin = ImageDecoder.begin_id if isinstance(decoder, ImageDecoder) else 2
        self.memory = Sequences.from_lengths([40] * batch, device)
        self.memory_ue = torch.randn(self.memory.total, width, device=device)
        self.length = decoder.num_positions
        self.written: dict[str, list[list[int]]] = {}

    def cached(self, method: str) -> Callable[[int], None]:
        """Decode one position at a time with cached keys and values."""
        options = DecodingConfig(method=method)  # type: ignore[arg-type]

        def run(_: int) -> None:
            self.written[method] = write(self.decoder, self.memory_ue, self.memory, self.begin, None, options)

        return run

    @torch.inference_mode()
    def without_cache(self, _: int) -> None:
        """Decode greedily, with the complete prefix again for every item."""
        ids_bl = torch.full((self.batch, 1), self.begin, dtype=torch.long, device=self.device)
        index_m = torch.arange(self.memory.total, device=self.device)
        for length in range(1, self.length + 1):
            sequences = Sequences.from_lengths([length] * self.batch, self.device)
            positions_w = torch.arange(length, device=self.device).repeat(self.batch)
            prefix = DecoderBatch(ids_bl.flatten(), ids_bl.flatten(), positions_w, sequences, index_m, self.memory)
            last_b = sequences.cu_seqlens[1:].long() - 1
            following_b = self.decoder.scores(prefix, self.memory_ue).index_select(0, last_b).argmax(-1)
            ids_bl = torch.cat([ids_bl, following_b[:, None]], dim=1)
        self.written["without"] = ids_bl[:, 1:].tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description="Captions and images per second, with and without a cache.")
    parser.add_argument("--config", default="opt-emoji")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY.PATH=VALUE", dest="settings")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    config, device = load_config(arguments.config, arguments.settings), torch.device(arguments.device)
    print(f"operators: {backend.choose(config.ops.backend, device)}")
    torch.manual_seed(1)
    model = OPT(config.model, config.tasks).to(device).eval()
    result: dict[str, Any] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
    table = []
    for what, decoder in (("captions", model.text_decoder), ("images", model.image_decoder)):
        for batch in arguments.batch:
            writing = Writing(decoder, batch, config.model.hidden_size, device)
            ways = {
                "greedy": writing.cached("greedy"),
                "beam": writing.cached("beam"),
                "without": writing.without_cache,
            }
            seconds = interleaved(ways, arguments.repeats, device=device)
            same = writing.written["greedy"] == writing.written["without"]
            ratio = median_ratio(seconds["without"], seconds["greedy"])
            result[f"{what} {batch}"] = {"seconds": seconds, "length": writing.length, "same": same, "ratio": ratio}
            rates = [f"{batch / sorted(seconds[way])[len(seconds[way]) // 2]:.1f}" for way in ways]
            table.append([what, str(writing.length), str(batch), *rates, f"{ratio:.2f}", "yes" if same else "NO"])
    print_table(["", "items each", "at a time", "greedy, per second", "beam of 4, per second", "without a cache, per second",
                 "speed-up by the cache", "same items"], table)  # fmt: skip
    write_result(arguments.output, result)
    return int(any(row[-1] == "NO" for row in table))


if __name__ == "__main__":
    raise SystemExit(main())
