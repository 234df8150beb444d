"""The bytes of stores of text, image and audio are fixed: the files of a small store of fixed input, by their SHA-256.

A change of these bytes changes fingerprints, so models would no longer recognise the stores they were trained on. The
hashes are of the files that opt_ds wrote before stores could have further modalities.
"""

import json
from pathlib import Path

import numpy as np

from opt_ds.store import inspect_store, set_codes
from opt_ds.store.split import split_by_list
from tests.store.fixed_store import contents, hashes, new_writer, write

UNFINISHED = {
    "partial.json": "a09d1a74a960067437d5027fa68d7d4da4c3b4d6e71bb7c74be141518c92d6eb",
    "shard-00000.h5": "cfef4016c183741271c0c34e5122768b5aaca8df98ce1d23e31487ebb24f0cb3",
    "shard-00000.json": "77e1b1d51c1030d919132d0bb382d06398855b4e9e2f6293f15b924c175d3251",
    "shard-00001.h5": "76c27c07183826c986203cb787665b549a1543e08bb1ddc4d950a6962a0148f1",
    "shard-00001.json": "57728e91929aa1eb5b668735c6cb7c68d0a1b9ed4f12e9541f75534de2bdbcd1",
    "shard-00002.h5": "0ff91ded40ae23570e71d590b9c94faff74ee550a3f56465c5a1ac2e26d5950a",
    "shard-00002.json": "1ca104324afa33a8e984d3fcc94e57cb8bd88f159a69fb633636b18b25bb3ac7",
    "tokenizer/tokenizer.json": "4e5557f8a6a9a28c26a57daceab3362040e1a3de437e432e445b3583cf1262f4",
}
FINISHED = {
    "index.h5": "b3eb9111a908ad05e11d262084f7977f8c2d3d6cdbea98120e0c4307cc645dee",
    "shard-00000.h5": "cfef4016c183741271c0c34e5122768b5aaca8df98ce1d23e31487ebb24f0cb3",
    "shard-00001.h5": "76c27c07183826c986203cb787665b549a1543e08bb1ddc4d950a6962a0148f1",
    "shard-00002.h5": "0ff91ded40ae23570e71d590b9c94faff74ee550a3f56465c5a1ac2e26d5950a",
    "store.json": "69ccf06dddec6d9a55bd6e2d96a17156ca62ee4a47e9124db717afd183dae7f1",
    "tokenizer/tokenizer.json": "4e5557f8a6a9a28c26a57daceab3362040e1a3de437e432e445b3583cf1262f4",
}
CHANGED = {
    "index.h5": "974a27478474e68524d1d8272b3df7d335d3739ae396ae4b1cf2cb6f32110546",
    "shard-00000-r2.h5": "702e60d8cd734aa2c7b3a44cb296a7cc0d908651dbda27176a8a56b45ac0f11a",
    "shard-00001-r2.h5": "eb8e6a5ddc507ba5fc6ab499f4b9bd6dec8a0dfa2a1a6f905182488151e1a4a6",
    "shard-00002-r2.h5": "e26f32344b6d35c93125ce78997d8ba67b522ec5d4c5b996e32976bd1a9198a6",
    "store.json": "f2964958d0736b91bc23cf08f509896219652c57defc52f352029060399a0756",
    "tokenizer/tokenizer.json": "4e5557f8a6a9a28c26a57daceab3362040e1a3de437e432e445b3583cf1262f4",
}


def test_a_store_of_the_three_modalities_keeps_its_bytes(tmp_path: Path) -> None:
    store = tmp_path / "s"
    writer = new_writer(store)
    write(writer, contents())
    assert hashes(store) == UNFINISHED
    writer.finish(3)
    assert hashes(store) == FINISHED
    assert inspect_store(store).failures == []
    (tmp_path / "list.csv").write_text("sämple1,valid\n", encoding="utf-8")
    split_by_list(store, tmp_path / "list.csv")
    set_codes(store, np.arange(3 * 64).reshape(3, 64) % 5, {"name": "fixed", "num_codes": 8})
    assert hashes(store) == CHANGED
    fields = json.loads((store / "store.json").read_text(encoding="utf-8"))
    assert "further" not in fields and "further" not in fields["shards"][0], "older versions refuse what they do not know"
