"""Test patches of vision transformers: equality with transformers and timm, places in the image, and folders that do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opt_ds.errors import UserError
from opt_ds.features.extractors import choose
from opt_ds.features.vit import ViTExtractor, ViTOptions, cells
from opt_ds.ingest import PrepareSettings
from opt_ds.ingest.file_features import FileFeatures
from tests.features.models import VISION, image_of_seed, save_timm, save_vision

TOLERANCE = 1e-5
#: A fault must change the features by this much, so that the comparison finds it.
FAULT = 1e-2
IMAGE = image_of_seed(3)
TIMM = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    "vit_base_patch16_siglip_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    "vit_small_patch16_dinov3": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    "beit_base_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of `VISION` or `TIMM`, saved once."""
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            path = tmp_path_factory.mktemp(name)
            saved[name] = save_vision(name, path) if name in VISION else save_timm(name, path, **TIMM[name])
        return saved[name]

    return folder


def extractor_of(folder: Path, **options: Any) -> ViTExtractor:
    return ViTExtractor(ViTOptions(weights=folder, **options))


def hugging_face_tokens(name: str, folder: Path, layer: int | None) -> np.ndarray:
    """Return the patch tokens [R, C] of `IMAGE` that transformers computes, with its own image processor and loader."""
    import transformers

    kind, *_, prefix = VISION[name]
    inputs = transformers.AutoImageProcessor.from_pretrained(folder)(images=IMAGE, return_tensors="pt")
    model = getattr(transformers, "ViTModel" if name == "vit" else kind).from_pretrained(folder).eval()
    with torch.inference_mode():
        output = getattr(model, "vision_model", model)(**inputs, output_hidden_states=True)
    tokens = output.last_hidden_state if layer is None else output.hidden_states[layer]
    count = int(inputs["spatial_shapes"][0].prod()) if "spatial_shapes" in inputs else None
    return tokens[0, prefix:].numpy()[:count]


def timm_tokens(folder: Path, layer: int | None) -> np.ndarray:
    """Return the patch tokens [R, C] of `IMAGE` that timm computes, with its own transform and loader."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        if layer is None:
            return model.forward_features(transform(IMAGE)[None])[0, model.num_prefix_tokens :].numpy()
        (found,) = model.forward_intermediates(transform(IMAGE)[None], indices=[layer - 1], intermediates_only=True)
    return found[0].flatten(1).T.numpy()


Reference = Callable[[str, int | None], np.ndarray]


@pytest.fixture(scope="module")
def reference(folder_of: Callable[[str], Path]) -> Reference:
    """The library's own features of `IMAGE` for a model and a layer, computed once."""
    found: dict[tuple[str, int | None], np.ndarray] = {}

    def features(name: str, layer: int | None) -> np.ndarray:
        if (name, layer) not in found:
            folder = folder_of(name)
            tokens = hugging_face_tokens(name, folder, layer) if name in VISION else timm_tokens(folder, layer)
            assert np.abs(tokens).max() > 0.3, "features of no size would equal anything"
            found[name, layer] = tokens
        return found[name, layer]

    return features


def difference(extractor: ViTExtractor, theirs: np.ndarray) -> float:
    """Return the largest difference of the extractor's features from the library's. Infinite for another number of patches."""
    (found,) = extractor.features([IMAGE])
    assert found is not None
    return float(np.abs(found[0] - theirs).max()) if found[0].shape == theirs.shape else np.inf


@pytest.mark.parametrize("name", [*VISION, *TIMM])
@pytest.mark.parametrize("layer", [None, 2])
def test_patches_are_those_of_the_library(
    folder_of: Callable[[str], Path], reference: Reference, name: str, layer: int | None
) -> None:
    extractor = extractor_of(folder_of(name), layer=layer)
    assert difference(extractor, reference(name, layer)) <= TOLERANCE
    assert (extractor.dim, extractor.num_classes) == (24, 0)
    assert extractor.fingerprint()["layer"] == layer


@pytest.mark.parametrize("name", [name for name in (*VISION, *TIMM) if not name.endswith("_vision_model")])
def test_the_comparison_finds_each_seeded_fault(folder_of: Callable[[str], Path], reference: Reference, name: str) -> None:
    """Wrong colours, another layer, the class token in the place of a patch, and no positions."""
    assert difference(extractor_of(folder_of(name), mean=(0.45, 0.5, 0.55)), reference(name, None)) > FAULT
    extractor = extractor_of(folder_of(name))
    assert difference(extractor, reference(name, 2)) > FAULT
    encoder: Any = extractor._encoder
    maps = encoder.maps
    encoder.maps = lambda *given: [own.flatten(1).roll(1, 1).reshape(own.shape) for own in maps(*given)]
    assert difference(extractor, reference(name, None)) > FAULT
    encoder.maps = maps
    assert difference(extractor, reference(name, None)) <= TOLERANCE
    network = getattr(encoder, "_model", None) or encoder._network
    kinds = ("position", "pos_embed")
    parameters = [own for key, own in network.named_parameters() if any(kind in key for kind in kinds)]
    assert parameters or hasattr(network, "rope") or hasattr(network, "rope_embeddings")
    with torch.no_grad():
        for own in parameters:
            own.zero_()
        for key, own in network.named_buffers():  # of rotary positions: an angle of 0
            if key.endswith(("inv_freq", "periods")):
                own.fill_({"inv_freq": 0.0, "periods": 1e9}[key.split(".")[-1]])
    if hasattr(network, "rope") and hasattr(network.rope, "pos_embed_cached"):
        network.rope.pos_embed_cached = None
    assert difference(extractor, reference(name, None)) > FAULT


@pytest.mark.parametrize("name", ["clip_vision_model", "siglip_vision_model"])
def test_published_names_of_weights_are_taken(
    folder_of: Callable[[str], Path], reference: Reference, tmp_path: Path, name: str
) -> None:
    """The folders on the Hub have the names of transformers 4, which transformers 5 no longer writes for these."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folder_of(name), tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    renamed = {f"vision_model.{key.removeprefix('vision_model.')}": weight for key, weight in weights.items()}
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert difference(extractor_of(folder), reference(name, None)) <= TOLERANCE


def test_layers_count_from_either_end(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("siglip")
    second, also, last, final = (extractor_of(folder, layer=layer) for layer in (2, -2, 3, None))
    assert also.fingerprint() == second.fingerprint()
    features = [extractor.features([image_of_seed(1)])[0][0] for extractor in (second, also, last, final)]  # type: ignore[index]
    assert np.array_equal(features[0], features[1])
    assert np.abs(features[2] - features[3]).max() > FAULT, "the last layer's output is not normalised, the network's is"
    for layer in (0, 4, -4):
        with pytest.raises(UserError, match=rf"image\.layer {layer}: the model has layers 1 to 3 \(or -1 to -3, from the last\)"):
            extractor_of(folder, layer=layer)


def test_each_patch_has_its_place_in_the_image(folder_of: Callable[[str], Path]) -> None:
    """CLIP cuts out the centre, so its patches leave the ends of a wide image out. SigLIP squashes it."""
    (regions,) = extractor_of(folder_of("clip")).extract([image_of_seed(0, 80, 60)])
    assert regions is not None
    left, top = np.array([8, 16, 24, 32, 40]) / 48, np.array([2, 10, 18, 26, 34]) / 36  # scaled to 48 x 36, cut to 32 x 32
    expected = [(left[x], top[y], left[x + 1], top[y + 1]) for y in range(4) for x in range(4)]
    assert np.allclose(regions.boxes[:, :4], expected, atol=1e-6)
    assert np.allclose(regions.boxes[:, 4:6], [8 / 48, 8 / 36], atol=1e-6)
    for extractor in (extractor_of(folder_of("siglip")), extractor_of(folder_of("clip"), fit="squash", resized=32)):
        (squashed,) = extractor.extract([image_of_seed(0, 80, 60)])
        assert squashed is not None
        assert squashed.boxes[5].tolist() == [0.25, 0.25, 0.5, 0.5, 0.25, 0.25, 0.0625]
    (flexible,) = extractor_of(folder_of("siglip2")).extract([image_of_seed(0, 90, 50)])
    assert flexible is not None
    assert len(flexible.features) == 18, "6 x 3 of at most 20 patches"
    assert np.allclose(flexible.boxes[7, :4], [1 / 6, 1 / 3, 2 / 6, 2 / 3])
    (right,) = extractor_of(folder_of("vit_tiny_patch16_224")).extract([image_of_seed(0, 80, 60)])
    assert right is not None
    assert np.allclose(right.boxes[0, :2], [7 / 46, 2 / 35]), "timm scales to 46 x 35 and rounds 1.5 to 2"


@pytest.mark.parametrize("name", ["clip", "siglip2", "vit_tiny_patch16_224"])
def test_pooling_averages_neighbouring_patches(folder_of: Callable[[str], Path], name: str) -> None:
    plain, pooled = extractor_of(folder_of(name)), extractor_of(folder_of(name), pool=2)
    image = image_of_seed(2, 60, 60)
    (features, corners), (averages, places) = plain.features([image])[0], pooled.features([image])[0]  # type: ignore[misc]
    assert averages.shape == (4, 24)
    assert np.allclose(averages[1], features.reshape(4, 4, 24)[:2, 2:].mean((0, 1)), atol=1e-5)
    assert np.allclose(places[1], [*corners[2][:2], *corners[7][2:]])
    assert cells(5, 2) == [(0, 3), (2, 5)]
    if name != "siglip2":
        with pytest.raises(UserError, match=r"image\.pool 5: the model has 4 x 4 patches: choose at most 4"):
            extractor_of(folder_of(name), pool=5)


@pytest.mark.parametrize(("name", "side"), [("clip", 48), ("siglip", 24), ("dinov2", 48), ("vit_tiny_patch16_224", 48)])
def test_another_side_interpolates_the_positions(folder_of: Callable[[str], Path], name: str, side: int) -> None:
    """`side` alone scales the image in the same proportion. The reference is the library's own interpolation."""
    folder = folder_of(name)
    extractor = extractor_of(folder, side=side)
    (found,) = extractor.features([image_of_seed(3)])
    assert found is not None
    assert found[0].shape == ((side // 8) ** 2, 24)
    if name == "vit_tiny_patch16_224":
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=side).eval()
        with torch.inference_mode():
            theirs = model.forward_features(extractor._encoder._pixels([image_of_seed(3)]))[0, 1:].numpy()  # type: ignore[attr-defined]
    else:
        import transformers

        model = getattr(transformers, VISION[name][0]).from_pretrained(folder).eval()
        flag = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
        with torch.inference_mode():
            pixels = extractor._encoder._pixels([image_of_seed(3)])  # type: ignore[attr-defined]
            theirs = getattr(model, "vision_model", model)(pixel_values=pixels, **flag).last_hidden_state[0].numpy()
        theirs = theirs[VISION[name][-1] :]
    assert np.abs(found[0] - theirs).max() <= TOLERANCE


def test_missing_images_change_nothing(folder_of: Callable[[str], Path]) -> None:
    extractor = extractor_of(folder_of("dinov3_vit"))
    first, nothing, second = extractor.extract([image_of_seed(0), None, image_of_seed(1, 60, 90)])
    (alone,) = extractor.extract([image_of_seed(1, 60, 90)])
    assert nothing is None
    assert first is not None and second is not None and alone is not None
    assert second.features.tobytes() == alone.features.tobytes()
    assert first.features.dtype == np.float16
    assert not first.labels.any() and (first.scores == 1).all()


def test_weights_without_a_configuration_are_named(tmp_path: Path) -> None:
    """The file alone, with timm's tag, whose settings timm knows, and without it, when they must be told."""
    import timm
    from safetensors.torch import save_file

    network = timm.create_model("test_vit", num_classes=3).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    file = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"no config\.json is next to it: name its architecture with --image-backbone timm/NAME"):
        extractor_of(file)
    with pytest.raises(UserError, match=r"states no input_size: set --extractor-option image\.side=… .*image\.std=…"):
        extractor_of(file, backbone="timm/test_vit")
    tagged = extractor_of(file, backbone="timm/test_vit.r160_in1k")
    assert tagged.fingerprint()["backbone"] == "timm/test_vit"
    assert (tagged.fingerprint()["side"], tagged.fingerprint()["resized"]) == (160, 168)
    told = dict(side=32, fit="squash", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert extractor_of(file, backbone="timm/test_vit", **told).features([image_of_seed()])[0][0].shape == (4, 64)  # type: ignore[index]
    for name, message in (
        ("timm/test_vot", r'"test_vot" is not a model of timm \(did you mean "test_vit"'),
        ("timm/test_vit.r170_in1k", 'timm knows no weights "test_vit.r170_in1k"'),
        ("timm/resnet18.a1_in1k", "timm's resnet18.a1_in1k is no vision transformer of patches"),
        ("timm/swin_tiny_patch4_window7_224.ms_in1k", "no vision transformer of patches|does not fit"),
        ("timm/vit_tiny_patch16_224.augreg_in21k", "does not fit timm's vit_tiny_patch16_224"),
        ("clip", "no config.json is next to it"),
    ):
        with pytest.raises(UserError, match=message) as error:
            extractor_of(file, backbone=name)
        assert "\n" not in str(error.value)


def test_a_folder_without_input_settings_must_be_told(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """All that is told is in the fingerprint, which alone then builds the same extractor."""
    folder = folder_of("clip_vision_model")
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no preprocessor_config\.json is there.*: set .*image\.side=….*image\.std=…"):
        extractor_of(bare)
    whole = choose("image", "vit", {"weights": folder, "pool": 2, "layer": -2})
    identity = whole.complete_fingerprint(whole.build("cpu"))
    again = choose("image", "vit", {**ViTExtractor.options_from(identity), "weights": bare})
    rebuilt = again.build("cpu")
    assert again.complete_fingerprint(rebuilt) == identity == json.loads(json.dumps(identity))
    assert ViTExtractor.needs_weights(identity)
    found, expected = (built.extract([image_of_seed()])[0].features for built in (rebuilt, whole.build("cpu")))
    assert np.array_equal(found, expected)
    nested = shutil.copytree(folder, tmp_path / "nested")
    settings = json.loads((nested / "preprocessor_config.json").read_text())
    (nested / "preprocessor_config.json").unlink()
    (nested / "processor_config.json").write_text(json.dumps({"image_processor": settings, "processor_class": "CLIPProcessor"}))
    assert extractor_of(nested).fingerprint() == extractor_of(folder).fingerprint(), "where transformers 5 writes it"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, r"its images keep their size \(do_resize is false\): set .*image\.side"),
        ({"size": {"height": 32, "width": 40}, "do_center_crop": False}, "not a square: set"),
        ({"crop_size": {"height": 32, "width": 24}}, "its input is not a square: set"),
        ({"do_center_crop": False}, "its input is not a square: set"),
        ({"size": {"shortest_edge": 24}}, r"resized 24 is less than side 32: set --extractor-option image\.resized=…"),
        ({"image_std": [0.0, 0.1, 0.1]}, "its mean and deviation are not those of three colours: set"),
        ({"image_mean": [0.5]}, "its mean and deviation are not those of three colours: set"),
        ({"resample": 9}, "its resample 9 is no interpolation of Pillow: set|cannot be used by CLIPImageProcessor"),
        ({"feature_extractor_type": "DetrFeatureExtractor"}, "is prepared by DetrFeatureExtractor, which is not supported"),
        ({"size": {"shortest_edge": 40}, "crop_size": 40}, r"its input settings say 40 x 40 pixels, .*for 32 x 32: choose with"),
        (None, r"preprocessor_config\.json: not readable as the settings"),
    ],
)
def test_input_settings_that_cannot_be_followed_are_one_line(
    folder_of: Callable[[str], Path], tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    folder = shutil.copytree(folder_of("clip_vision_model"), tmp_path / "m")
    file = folder / "preprocessor_config.json"
    file.write_text("[1" if change is None else json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        extractor_of(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["clip", "dinov3_vit", "vit", "vit_tiny_patch16_224"])
def test_weights_that_do_not_fit_are_refused_by_name(folder_of: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folder_of(name), tmp_path / "m")
    file = folder / "model.safetensors"
    weights = load_file(file)
    lacking = next(key for key in sorted(weights) if "norm" in key and not key.startswith("text_model") and ".1." in key)
    for changed, message in (
        ({key: value for key, value in weights.items() if key != lacking}, "its weights lack .*norm"),
        ({**weights, "someone.else.weight": torch.zeros(2)}, r"which has no someone\.else\.weight: it is another model's"),
        ({**weights, lacking: torch.zeros(5)}, r"norm.* is \[5\], not \[24\]"),
        ({**weights, lacking: torch.full((24,), torch.nan)}, f"{lacking} is NaN or infinite"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(UserError, match=message) as error:
            extractor_of(folder)
        assert "\n" not in str(error.value)


def test_a_configuration_of_another_model_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folder_of("clip_vision_model"), tmp_path / "m")
    fields = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "bert"}, "vit reads: model_type in its config.json is 'bert': supported are clip"),
        ({"model_type": None}, "not a vision transformer that vit reads"),
        ({"num_hidden_layers": 2}, r"which has no encoder\.layers\.2"),
        ({"num_hidden_layers": 4}, r"its weights lack encoder\.layers\.3"),
        ({"hidden_size": 26}, r"is \[.*24.*\], not \["),
        ({"num_attention_heads": 7}, "config.json"),
        ({"hidden_size": 200_000, "intermediate_size": 200_000}, "describes a network of .* parameters, the weights are "),
        ({"patch_size": 16}, r"is \[.*\], not \["),
        ({"model_type": "siglip_vision_model"}, "its weights lack|which has no|is "),
        ({"model_type": "vit"}, "its weights lack|which has no|is "),
        ({"_attn_implementation": "someone/repo", "auto_map": {"AutoModel": "code.Model"}}, ""),
    ):
        (folder / "config.json").write_text(json.dumps({**fields, **change}))
        if not message:
            assert extractor_of(folder).dim == 24, "no code is looked for"
            continue
        with pytest.raises(UserError, match=message) as error:
            extractor_of(folder)
        assert "\n" not in str(error.value)


def test_another_encoder_than_named_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    for name, named, own in (
        ("siglip", "clip", "siglip"),
        ("vit", "timm/vit_tiny_patch16_224", "vit"),
        ("vit_tiny_patch16_224", "timm/vit_small_patch16_224", "timm/vit_tiny_patch16_224"),
    ):
        with pytest.raises(UserError, match=f"its architecture is {own}, not {named}: --image-backbone {own}, or"):
            extractor_of(folder_of(name), backbone=named)
    assert extractor_of(folder_of("siglip"), backbone="siglip").dim == 24
    for options, message in (
        ({}, "--images vit: it needs a model: name its folder with --image-weights"),
        ({"weights": tmp_path / "none"}, "none: no such file or folder"),
        ({"weights": tmp_path}, "no config.json there, so it is not a vision transformer folder"),
        ({"weights": folder_of("siglip"), "max_patches": 9}, "siglip has no option max_patches: set image.side instead"),
        ({"weights": folder_of("siglip2"), "side": 32}, r"set image\.max_patches instead of image\.side"),
    ):
        with pytest.raises(UserError, match=message) as error:
            choose("image", "vit", options).build("cpu")
        assert "\n" not in str(error.value)


def test_features_that_no_store_can_hold_cost_their_files_only(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A network whose output overflows, and an image too long to cut a square out of it."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folder_of("siglip_vision_model"), tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if key.endswith("post_layernorm.weight"))
    image_of_seed().save(tmp_path / "a.png")
    Image.new("RGB", (3000, 10)).save(tmp_path / "long.png")
    first = next(key for key in weights if key.endswith("layers.0.layer_norm1.weight"))
    for changed in ({key: weights[key] * 1e6}, {first: weights[first] * 1e30}):
        save_file({**weights, **changed}, folder / "model.safetensors", {"format": "pt"})
        settings = PrepareSettings(images="vit", image_weights=folder)
        (failure,) = FileFeatures({"image": settings.extractor("image")}, settings, "cpu").chunk("image", ["a.png"], tmp_path)
        assert "regions cannot be stored" in failure.reason  # type: ignore[union-attr]
        assert "NaN" in failure.reason or "infinite" in failure.reason  # type: ignore[union-attr]
    settings = PrepareSettings(images="vit", image_weights=folder_of("clip"))
    files = FileFeatures({"image": settings.extractor("image")}, settings, "cpu")
    long, good = files.chunk("image", ["long.png", "a.png"], tmp_path)
    assert "an image of 3000 x 10 pixels is too long for cutting a square out of it: set image.fit=squash" in long.reason  # type: ignore[union-attr]
    assert len(good.item.features) == 16  # type: ignore[union-attr]
