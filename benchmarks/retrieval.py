"""Compare two-stage retrieval with scoring all pairs: runs of encoder and decoder, R@1 and time, for the same gallery.

    python benchmarks/retrieval.py --checkpoint runs/emoji --store data/emoji [--shortlist 50] [--queries 200]

The gallery is every sample of the store that has all three modalities, whatever its split. The queries are a seeded
choice of a held-out split. `all pairs` scores each query with each candidate: one encoder run per pair by the matching
head, one decoder run per pair by likelihood. The projection is fitted on the training split before, once for all
queries. Its time is reported separately.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT  # noqa: E402
from opt_ds.evaluation.evaluator import Evaluator  # noqa: E402
from opt_ds.evaluation.retrieval import DIRECTIONS, recall, same_pairs  # noqa: E402
from opt_ds.evaluation.two_stage_retrieval import TwoStages  # noqa: E402
from opt_ds.store.files import write_json  # noqa: E402
from opt_ds.store.reader import FeatureStore  # noqa: E402
from opt_ds.training.checkpoint import load_model  # noqa: E402
from opt_ds.training.preflight import check_store  # noqa: E402


def complete_gallery(store: FeatureStore) -> np.ndarray:
    """Return the samples of all splits with text, image and audio."""
    return np.flatnonzero((store.rows[:, [TEXT, IMAGE, AUDIO]] >= 0).all(1))


def compare(
    stages: TwoStages, direction: str, score: str, queries: np.ndarray, gallery: np.ndarray, shortlist: int
) -> dict[str, Any]:
    """Measure both methods on the same queries and candidates."""
    began = time.perf_counter()
    stages.first_stage(direction, queries[:1], gallery[:1])  # fit the projection
    fitted = time.perf_counter()
    two = stages.figures(direction, queries, gallery, shortlist, (score,))
    done = time.perf_counter()

    everything_qc = np.broadcast_to(np.arange(len(gallery)), (len(queries), len(gallery)))
    score_pairs = stages.matching if score == "matching" else stages.likelihood
    scores_qc = np.concatenate(
        [
            score_pairs(direction, queries[i : i + 1], gallery, everything_qc[i : i + 1]).values
            for i in range(len(queries))
        ]
        if score == "matching"
        else [score_pairs(direction, queries, gallery, everything_qc).values]
    )
    same_qc = same_pairs(stages.evaluator, queries, gallery, *DIRECTIONS[direction])
    return {
        "direction": direction, "score": score, "queries": len(queries), "candidates": len(gallery), "shortlist": shortlist,
        "chance": two["chance"]["R@1"], "projection": two["projection"], "shortlist_recall": two["shortlist_recall"],
        "two_stages": two[score], "all_pairs": recall(scores_qc, same_qc), "fit_s": fitted - began, "two_stages_s": done - fitted,
        "all_pairs_s": time.perf_counter() - done,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--split", default="test_variant", help="split of the queries")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--shortlist", type=int, default=50)
    parser.add_argument("--score", choices=("likelihood", "matching"), action="append", help="default: both")
    parser.add_argument("--direction", choices=tuple(DIRECTIONS), action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("retrieval.json"))
    options = parser.parse_args()

    store = FeatureStore(options.store)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = load_model(options.checkpoint, device)
    check_store(config, store)
    evaluator = Evaluator(model, config, store, device)
    gallery = complete_gallery(store)
    queries = evaluator.samples_with(options.split, (TEXT, IMAGE, AUDIO), options.queries, options.seed)
    stages = TwoStages(evaluator, options.seed)
    print("| direction | score | R@1 all pairs | R@1 two stages | projection alone | in shortlist | encoder runs of all pairs | "
          "decoder runs of all pairs | seconds, all pairs | seconds, two stages |\n|" + "---|" * 10)  # fmt: skip
    found = []
    for score in options.score or ("likelihood", "matching"):
        for direction in options.direction or DIRECTIONS:
            if score == "likelihood" and direction == "text_audio_to_image":
                continue
            row = compare(stages, direction, score, queries, gallery, options.shortlist)
            found.append(row)
            two, first = row["two_stages"], row["projection"]
            print(f"| {direction} | {score} | {row['all_pairs']['R@1']:.1%} | {two['R@1']:.1%} | {first['R@1']:.1%} | "
                  f"{row['shortlist_recall']:.1%} | {two['encoder_fraction']:.2%} | {two['decoder_fraction']:.2%} | "
                  f"{row['all_pairs_s']:.0f} | {row['two_stages_s']:.0f} |", flush=True)  # fmt: skip
            write_json(options.output, {"store": store.fingerprint, "threads": torch.get_num_threads(), "rows": found})
    print(json.dumps({"queries": len(queries), "candidates": len(gallery), "shortlist": options.shortlist}))


if __name__ == "__main__":
    main()
