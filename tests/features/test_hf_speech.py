"""Test frames of speech encoders: equality with transformers, windows of long audio, and folders that do not fit."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.errors import UserError
from opt_ds.features.extractors import choose
from opt_ds.features.hf_speech import HFSpeechExtractor, HFSpeechOptions
from opt_ds.features.wav2vec2 import Wav2Vec2Extractor, Wav2Vec2Options
from opt_ds.ingest import PrepareSettings
from opt_ds.ingest.file_features import FileFeatures
from tests.features.models import SPEECH, save_speech, speech

TOLERANCE = 1e-5
#: A fault must change the features by this much, so that the comparison finds it.
FAULT = 1e-3
WAVEFORM = speech(1.23)
#: Whisper's longest input has 2 s here.
OVERLAP = {"overlap_s": 0.4}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of `SPEECH`, saved once."""
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            saved[name] = save_speech(name, tmp_path_factory.mktemp(name))
        return saved[name]

    return folder


def extractor_of(folder: Path, **options: Any) -> HFSpeechExtractor:
    return HFSpeechExtractor(HFSpeechOptions(weights=folder, **{**OVERLAP, **options}))


Reference = Callable[[str, tuple[int, ...]], np.ndarray]


@pytest.fixture(scope="module")
def reference(folder_of: Callable[[str], Path]) -> Reference:
    """The frames [T, C] of `WAVEFORM` by transformers' own feature extractor and loader: of the model, or the mean of layers."""
    import transformers

    outputs: dict[str, tuple[Any, Any]] = {}

    def frames(name: str, layers: tuple[int, ...]) -> np.ndarray:
        if name not in outputs:
            kind = {"wav2vec2": "Wav2Vec2Model", "whisper": "WhisperModel"}.get(name, SPEECH[name][0])
            extractor = transformers.AutoFeatureExtractor.from_pretrained(folder_of(name))
            inputs = extractor(WAVEFORM, sampling_rate=16_000, return_tensors="pt")
            model = getattr(transformers, kind).from_pretrained(folder_of(name)).eval()
            with torch.inference_mode():
                outputs[name] = inputs, (model.encoder if name == "whisper" else model)(**inputs, output_hidden_states=True)
        inputs, output = outputs[name]
        found = torch.stack([output.hidden_states[layer] for layer in layers] or [output.last_hidden_state]).mean(0)[0]
        if name == "whisper":
            found = found[: -(-len(WAVEFORM) // 320)]
        elif name == "wav2vec2-bert":
            found = found[inputs["attention_mask"][0].bool()]
        assert found.abs().max() > 0.3, "features of no size would equal anything"
        return found.numpy()

    return frames


def difference(extractor: HFSpeechExtractor, theirs: np.ndarray) -> float:
    """Return the largest difference of the extractor's frames from the library's. Infinite for another number of frames."""
    ours = extractor.frames(WAVEFORM)
    return float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else np.inf


@pytest.mark.parametrize("name", SPEECH)
def test_frames_are_those_of_the_library(folder_of: Callable[[str], Path], reference: Reference, name: str) -> None:
    folder = folder_of(name)
    extractor = extractor_of(folder)
    assert difference(extractor, reference(name, ())) <= TOLERANCE
    assert (extractor.dim, extractor.frame_rate_hz) == (24, 50)
    assert difference(extractor_of(folder, layer=2), reference(name, (2,))) <= TOLERANCE
    assert difference(extractor_of(folder, layers=(1, -1)), reference(name, (1, 3))) <= TOLERANCE
    frames, nothing = extractor.extract([WAVEFORM, None])
    assert nothing is None
    assert frames is not None and frames.dtype == np.float16
    assert np.array_equal(frames, extractor.frames(WAVEFORM).astype("float16"))


@pytest.mark.parametrize("name", SPEECH)
def test_the_comparison_finds_each_seeded_fault(folder_of: Callable[[str], Path], reference: Reference, name: str) -> None:
    """Another normalisation or spectrogram, another layer, a frame too late, and no positions."""
    extractor: Any = extractor_of(folder_of(name))
    theirs = reference(name, ())
    assert difference(extractor, reference(name, (2,))) > FAULT
    assert difference(extractor, reference(name, (1, 3))) > FAULT
    hidden, own = extractor._hidden, extractor._input
    extractor._hidden = lambda inputs: hidden(inputs).roll(1, 0)
    assert difference(extractor, theirs) > FAULT
    extractor._hidden = hidden
    if own.normalise is None:
        part = own.part
        own.part = lambda *given: {key: value * torch.linspace(0.5, 1.5, value.shape[-1]) for key, value in part(*given).items()}
        assert difference(extractor, theirs) > FAULT
        own.part = part
    else:
        own.normalise = not own.normalise
        assert difference(extractor, theirs) > FAULT
        own.normalise = not own.normalise
    assert difference(extractor, theirs) <= TOLERANCE
    kinds = ("rel_attn_embed", "pos_conv_embed", "distance_embedding", "embed_positions")
    found = 0
    for kind in kinds:  # WavLM's relative positions are dropped alone first, then the convolutional ones too
        positions = [weight for key, weight in extractor._model.named_parameters() if kind in key and "original1" not in key]
        found += len(positions)
        with torch.no_grad():
            for weight in positions:
                weight.zero_()
        assert not positions or difference(extractor, theirs) > FAULT, kind
    assert found


@pytest.mark.parametrize("name", ["wav2vec2", "wavlm", "wav2vec2-bert", "whisper"])
def test_windows_cover_long_audio_once(folder_of: Callable[[str], Path], name: str) -> None:
    """The number of frames is that of a single pass, and in the middle of a window the frames are nearly its own."""
    waveform = speech(4.5, seed=1)
    options = {"window_s": 1.5, "overlap_s": 0.5, "layer": 1}
    frames = extractor_of(folder_of(name), **options).frames(waveform)
    count = {"wav2vec2-bert": 224, "whisper": 225}.get(name, 224)
    assert len(frames) == count
    if name == "whisper":  # its own longest input; each frame's context differs, so only its position in time is compared
        first = extractor_of(folder_of(name), **options).frames(waveform[: 63 * 320])
        assert np.array_equal(frames[:51], first[:51])
        return
    whole = extractor_of(folder_of(name), layer=1).frames(waveform)
    assert whole.shape == frames.shape
    similar = [np.corrcoef(ours, theirs)[0, 1] for ours, theirs in zip(frames, whole, strict=True)]
    assert min(similar) > 0.8


@pytest.mark.parametrize("name", SPEECH)
def test_short_audio_has_one_frame(folder_of: Callable[[str], Path], name: str) -> None:
    (frames,) = extractor_of(folder_of(name)).extract([speech(0.004)])
    assert frames is not None
    assert frames.shape == (1, 24)
    assert np.isfinite(frames).all()


def test_wav2vec2_and_hf_speech_agree(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("wav2vec2")
    (older,) = Wav2Vec2Extractor(Wav2Vec2Options(weights=folder, layer=2)).extract([speech(1.0)])
    (frames,) = extractor_of(folder, layer=2).extract([speech(1.0)])
    assert np.array_equal(older, frames)


def test_an_adapter_is_left_out(tmp_path: Path) -> None:
    """It would lower the frame rate."""
    folder = save_speech("wav2vec2-bert", tmp_path, {"add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 24})
    extractor = extractor_of(folder)
    assert len(extractor.frames(speech(1.0))) == 49
    assert extractor.frame_rate_hz == 50


def test_a_fingerprint_builds_the_same_extractor(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    bare = shutil.copytree(folder_of("hubert"), tmp_path / "m")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no preprocessor_config\.json there, .* normalises its input: set .*audio\.normalise"):
        extractor_of(bare)
    choice = choose("audio", "hf_speech", {"weights": folder_of("hubert"), "layers": [2, 3], "backbone": "hubert"})
    identity = choice.complete_fingerprint(choice.build("cpu"))
    assert (identity["layer"], identity["layers"], identity["normalise"]) == (None, [2, 3], True)
    again = choose("audio", "hf_speech", {**HFSpeechExtractor.options_from(identity), "weights": bare})
    assert again.complete_fingerprint(again.build("cpu")) == identity == json.loads(json.dumps(identity))


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-bert", "whisper"])
def test_weights_that_do_not_fit_are_refused_by_name(folder_of: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folder_of(name), tmp_path / "m")
    file = folder / "model.safetensors"
    weights = load_file(file)
    lacking = next(key for key in sorted(weights) if "decoder" not in key and "layers.1." in key and "norm" in key)
    for changed, message in (
        ({key: value for key, value in weights.items() if key != lacking}, "its weights lack .*norm"),
        ({**weights, "someone.else.weight": torch.zeros(2)}, r"which has no someone\.else\.weight: it is another model's"),
        ({**weights, lacking: torch.zeros(5)}, r"norm.* is \[5\], not \[24\]"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(UserError, match=message) as error:
            extractor_of(folder)
        assert "\n" not in str(error.value)
    unmasked = {key: value for key, value in weights.items() if "masked_spec_embed" not in key}
    save_file(unmasked, file, {"format": "pt"})
    assert extractor_of(folder).dim == 24, "the mask vector is used in training only"


@pytest.mark.parametrize(
    ("name", "config", "settings", "message"),
    [
        ("hubert", {"model_type": "bert"}, {}, "that hf_speech reads: model_type in its config.json is 'bert'"),
        ("hubert", {"model_type": "wavlm"}, {}, "its weights lack|which has no"),
        ("hubert", {"num_hidden_layers": 4}, {}, r"its weights lack encoder\.layers\.3"),
        ("hubert", {"hidden_size": 25}, {}, "do not fit each other|cannot be used|is "),
        ("hubert", {}, {"sampling_rate": 8000}, "it was trained on audio of 8000 Hz, only 16000 is supported"),
        ("hubert", {}, {"feature_extractor_type": "WhisperFeatureExtractor"}, "is prepared by WhisperFeatureExtractor"),
        ("wav2vec2-bert", {}, {"num_mel_bins": 40}, "makes frames of 80 numbers, its network takes 160"),
        ("whisper", {}, {"chunk_length": 3}, "makes 80 bins of 300 frames, its network takes 80 of 200"),
        ("whisper", {}, {"feature_size": 40}, "makes 40 bins of 200 frames"),
        ("whisper", {}, None, r"no preprocessor_config\.json there, which describes its spectrogram"),
    ],
)
def test_a_folder_that_disagrees_with_itself_is_refused(
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    config: dict[str, Any],
    settings: dict[str, Any] | None,
    message: str,
) -> None:
    folder = shutil.copytree(folder_of(name), tmp_path / "m")
    for file, change in ((folder / "config.json", config), (folder / "preprocessor_config.json", settings)):
        file.write_text(json.dumps({**json.loads(file.read_text()), **(change or {})}))
    if settings is None:
        (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=message) as error:
        extractor_of(folder)
    assert "\n" not in str(error.value)


def test_options_that_cannot_be_met_are_one_line(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    hubert, whisper = folder_of("hubert"), folder_of("whisper")
    for options, message in (
        ({}, "--speech hf_speech: it needs a model: name its folder with --speech-weights"),
        ({"weights": tmp_path / "none"}, "none: no such folder"),
        ({"weights": tmp_path}, "no config.json there, so it is not a speech encoder folder"),
        ({"weights": hubert / "model.safetensors"}, "a file, not a folder: name the Hugging Face folder"),
        ({"weights": hubert, "backbone": "wavlm"}, "its architecture is hubert, not wavlm: set audio.backbone=hubert"),
        ({"weights": hubert, "layer": 4}, r"--speech-layer 4: the model has layers 1 to 3 \(or -1 to -3"),
        ({"weights": hubert, "layers": [1, 0]}, r"audio\.layers 0: the model has layers 1 to 3"),
        ({"weights": hubert, "layers": [1], "layer": 1}, "layer and layers: give one of them"),
        ({"weights": hubert, "layers": []}, "layers: must hold at least 1 items"),
        ({"weights": hubert, "overlap_s": 15}, "must be less than half of window_s 30"),
        ({"weights": whisper}, r"its longest input is 2 s: --speech-overlap 2 must be less than half of it"),
        ({"weights": whisper, "overlap_s": 0.5, "normalise": True}, r"its input is a spectrogram.*: omit audio\.normalise"),
    ):
        with pytest.raises(UserError, match=message) as error:
            choose("audio", "hf_speech", options).build("cpu")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("extractor", ["hf_speech", "wav2vec2"])
def test_checkpoints_of_fairseq_name_the_conversion(tmp_path: Path, extractor: str, legacy: bool) -> None:
    """With its options as Python objects, as Fairseq writes them, in both of torch's formats; and WavLM's first release."""
    import argparse

    file = tmp_path / "hubert_base_ls960.pt"
    options = argparse.Namespace(arch="hubert", conv_feature_layers="[(512,10,5)]")
    torch.save(
        {"args": options, "model": {"mask_emb": torch.zeros(2)}, "optimizer_history": []}, file,
        _use_new_zipfile_serialization=not legacy,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"Fairseq: convert it to a Hugging Face folder with .*convert_<model>_original") as error:
        choose("audio", extractor, {"weights": file}).build("cpu")
    assert "\n" not in str(error.value)
    torch.save({"cfg": {"encoder_layerdrop": 0.05}, "model": {"mask_emb": torch.zeros(2)}}, file)
    with pytest.raises(UserError, match="a checkpoint of Fairseq"):
        choose("audio", extractor, {"weights": file}).build("cpu")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme", "fairseq")
    with pytest.raises(UserError, match=r"a file, not a folder|not a checkpoint of plain tensors"):
        choose("audio", extractor, {"weights": file}).build("cpu")


def test_frames_that_no_store_can_hold_cost_their_file_only(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    import soundfile
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(folder_of("hubert"), tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    ends = ("encoder.layer_norm.weight", "layers.0.layer_norm.weight")
    last, first = (next(key for key in weights if key.endswith(end)) for end in ends)
    soundfile.write(tmp_path / "a.wav", speech(0.5), 16_000)
    for changed in ({last: weights[last] * 1e7}, {first: weights[first] * 1e30}):
        save_file({**weights, **changed}, folder / "model.safetensors", {"format": "pt"})
        settings = PrepareSettings(speech="hf_speech", speech_weights=folder)
        (failure,) = FileFeatures({"audio": settings.extractor("audio")}, settings, "cpu").chunk("audio", ["a.wav"], tmp_path)
        assert "speech cannot be stored" in failure.reason  # type: ignore[union-attr]
        assert "NaN" in failure.reason or "infinite" in failure.reason  # type: ignore[union-attr]
