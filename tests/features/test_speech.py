"""Test speech extractors: log-mel against its formula, wav2vec 2.0 against the models, audio files of every kind."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from opt_ds.decoding.audio import SAMPLE_RATE_HZ, trim_silence
from opt_ds.decoding.decoder import DecodingError
from opt_ds.errors import UserError
from opt_ds.features.extractors import choose
from opt_ds.features.logmel import LogMelExtractor
from opt_ds.features.wav2vec2 import Wav2Vec2Extractor, Wav2Vec2Options, windows
from opt_ds.ingest import PrepareSettings
from tests.decoded import audio_of


def tone(hz: float, seconds: float, rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate_hz)) / rate_hz)).astype("float32")


def test_logmel_has_the_right_rate_and_shows_the_pitch() -> None:
    extractor = LogMelExtractor()
    low, high, silent, short = extractor.extract(
        [tone(300, 1), tone(3000, 0.5), np.zeros(1600, "float32"), tone(300, 0.001)]
    )
    assert low.shape == (101, 80)
    assert low.dtype == np.float16
    assert high.shape == (51, 80)
    assert low.mean(0).argmax() < high.mean(0).argmax() - 20
    assert np.allclose(silent, np.log(1e-5), atol=0.01)
    assert len(short) >= 1
    assert np.isfinite(short).all()


def test_logmel_equals_its_formula() -> None:
    waveform = np.random.default_rng(0).standard_normal(4000).astype("float32") * 0.1
    (frames,) = LogMelExtractor().extract([waveform])
    start = 10 * 160 - 256  # frame 10 is centred on sample 1600
    window = np.zeros(512)
    window[56:456] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs(np.fft.rfft(waveform[start : start + 512] * window)) ** 2
    corners = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
    bins = np.linspace(0, 8000, 257)
    rise = (bins[None] - corners[:-2, None]) / np.diff(corners)[:-1, None]
    fall = (corners[2:, None] - bins[None]) / np.diff(corners)[1:, None]
    energies = np.maximum(0, np.minimum(rise, fall)) @ power
    assert np.allclose(frames[10], np.log(np.maximum(energies, 1e-5)), atol=0.02)


@pytest.mark.parametrize(
    ("name", "rate_hz", "channels"),
    [("a.wav", 8000, 1), ("a.wav", 44100, 2), ("a.flac", 22050, 1), ("a.ogg", 48000, 2), ("a.mp3", 32000, 1)],
)
def test_audio_files_of_every_kind_become_mono_16_khz(tmp_path: Path, name: str, rate_hz: int, channels: int) -> None:
    samples = np.repeat(tone(440, 0.5, rate_hz)[:, None], channels, 1)
    soundfile.write(tmp_path / name, samples, rate_hz)
    mono = audio_of(tmp_path / name)
    assert mono.dtype == np.float32
    assert len(mono) == pytest.approx(8000, abs=1500 if name.endswith("mp3") else 2)
    spectrum = np.abs(np.fft.rfft(mono))
    assert np.argmax(spectrum) * SAMPLE_RATE_HZ / len(mono) == pytest.approx(440, abs=4)


def test_broken_audio_files_are_errors(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, "float32"), 16000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("not an audio file")
    with pytest.raises(ValueError, match="no samples"):
        audio_of(tmp_path / "empty.wav")
    with pytest.raises(ValueError, match="NaN"):
        audio_of(tmp_path / "nan.wav")
    with pytest.raises(DecodingError, match="it is text: accepted are WAV"):
        audio_of(tmp_path / "text.wav")


def test_a_small_file_of_many_channels_at_a_high_rate_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "bomb.flac", np.zeros((192_000, 8)), 192_000)
    with pytest.raises(ValueError, match=r"1 s of 8 channels at 192000 Hz are more than 7 s of one"):
        audio_of(tmp_path / "bomb.flac", max_seconds=7)
    assert len(audio_of(tmp_path / "bomb.flac", max_seconds=8)) == SAMPLE_RATE_HZ


def test_rates_without_a_common_divisor_are_resampled_in_little_memory(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "odd.wav", tone(440, 2, 44057), 44057)
    mono = audio_of(tmp_path / "odd.wav")
    assert len(mono) == pytest.approx(32000, abs=3)
    assert np.argmax(np.abs(np.fft.rfft(mono))) / 2 == pytest.approx(440, abs=1)


def test_silence_at_the_ends_is_trimmed() -> None:
    silence = np.random.default_rng(0).standard_normal(16000).astype("float32") * 1e-4
    trimmed = trim_silence(np.concatenate([silence, tone(300, 1), silence]))
    assert 16000 + 2 * 1600 <= len(trimmed) <= 16000 + 2 * 1600 + 640
    assert len(trim_silence(np.zeros(5000, "float32"))) == 5000
    assert len(trim_silence(tone(300, 0.01))) == 160


def test_wav2vec2_from_a_hugging_face_folder(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    model = Wav2Vec2Model(config).eval()
    model.save_pretrained(tmp_path / "hf")
    plain = Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path / "hf"))
    waveforms = [tone(300, 1), tone(500, 0.01)]
    frames, short = plain.extract(waveforms)
    assert plain.dim == 32
    assert plain.frame_rate_hz == 50
    with torch.inference_mode():
        expected = model(torch.from_numpy(waveforms[0])[None]).last_hidden_state[0].numpy()
    assert frames.shape == (49, 32)
    assert np.abs(frames - expected).max() < 5e-3
    assert short.shape == (1, 32)
    (tmp_path / "hf" / "preprocessor_config.json").write_text('{"do_normalize": true}')
    normal = Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path / "hf"))
    assert np.abs(normal.extract([waveforms[0] * 0.1])[0] - normal.extract([waveforms[0]])[0]).max() < 0.02
    assert normal.fingerprint() != plain.fingerprint()


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small wav2vec 2.0 with random weights, saved as Hugging Face publishes one."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("hf")
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, conv_dim=[16] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer", do_stable_layer_norm=True,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return folder


def test_the_processors_file_says_whether_to_normalise_too(hugging_face: Path, tmp_path: Path) -> None:
    """transformers 5 writes a processor's feature extractor there, and no separate file."""
    shutil.copytree(hugging_face, tmp_path / "hf")
    own, processor = tmp_path / "hf" / "preprocessor_config.json", tmp_path / "hf" / "processor_config.json"
    settings = json.loads(own.read_text())
    own.unlink()
    for content, normalise in (
        ({"feature_extractor": settings}, True),
        ({"feature_extractor": {**settings, "do_normalize": False}}, False),
        ({"processor_class": "Wav2Vec2Processor"}, False),
    ):
        processor.write_text(json.dumps(content))
        assert Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path / "hf")).fingerprint()["normalise"] is normalise


def test_older_names_of_weights_are_taken_and_lacking_ones_refused(hugging_face: Path, tmp_path: Path) -> None:
    """Weights that a checkpoint lacks would be random, and different in every worker."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(hugging_face, tmp_path / "hf")
    file, waveform = tmp_path / "hf" / "model.safetensors", tone(300, 0.5)
    weights, bytes_before = load_file(file), file.read_bytes()
    (expected,) = Wav2Vec2Extractor(Wav2Vec2Options(weights=hugging_face)).extract([waveform])
    place, new = "encoder.pos_conv_embed.conv.", "parametrizations.weight.original"
    older = {key.replace(f"{place}{new}0", f"{place}weight_g").replace(f"{place}{new}1", f"{place}weight_v"): weight
             for key, weight in weights.items() if key != "masked_spec_embed"}  # fmt: skip
    assert len(older.keys() - weights.keys()) == 2
    save_file({f"wav2vec2.{key}": weight for key, weight in older.items()}, file, {"format": "pt"})
    (frames,) = Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path / "hf")).extract([waveform])
    assert np.array_equal(frames, expected)
    save_file({f"bert.{key}": weight for key, weight in weights.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit the wav2vec 2\.0 of its config\.json: its weights lack encoder."):
        Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path / "hf"))
    file.write_bytes(bytes_before[: len(bytes_before) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: .*: truncated or damaged: download it again") as error:
        Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path / "hf"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layer", [1, 2, 3, None])
def test_each_layer_is_hugging_faces_own(hugging_face: Path, layer: int | None) -> None:
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

    waveform = tone(300, 1.3) + 0.1
    extractor = Wav2Vec2Extractor(Wav2Vec2Options(weights=hugging_face, layer=layer))
    inputs = Wav2Vec2FeatureExtractor.from_pretrained(hugging_face)(waveform, sampling_rate=16000, return_tensors="pt")
    with torch.inference_mode():
        model = Wav2Vec2Model.from_pretrained(hugging_face).eval()
        expected = model(inputs.input_values, output_hidden_states=True).hidden_states[layer or 3][0]
    (frames,) = extractor.extract([waveform])
    assert np.array_equal(frames, expected.to(torch.float16).numpy())


def test_layers_that_are_not_there_are_refused(hugging_face: Path) -> None:
    for layer in (0, 4, -1):
        with pytest.raises(UserError, match=r"--speech-layer .*: the checkpoint has layers 1 to 3"):
            Wav2Vec2Extractor(Wav2Vec2Options(weights=hugging_face, layer=layer))
    with pytest.raises(UserError, match="--speech-layer: logmel has no option layer: leave it out"):
        PrepareSettings(speech_layer=2).extractor("audio")


@pytest.mark.parametrize("seconds", [0.9, 1.0, 1.02, 2.5, 5.0])
def test_windows_cover_every_frame_once(hugging_face: Path, seconds: float) -> None:
    """The number of frames is that of one pass. In the middle of a window, the frames are nearly the same."""
    random = np.random.default_rng(0).standard_normal(int(seconds * 16000)).astype("float32") * 0.1
    whole = Wav2Vec2Extractor(Wav2Vec2Options(weights=hugging_face, layer=1))
    parts = Wav2Vec2Extractor(Wav2Vec2Options(weights=hugging_face, layer=1, window_s=1.0, overlap_s=0.4))
    (expected,), (frames,) = whole.extract([random]), parts.extract([random])
    assert frames.shape == expected.shape
    if len(expected) <= 50:
        assert np.array_equal(frames, expected)
    similar = [np.corrcoef(ours, theirs)[0, 1] for ours, theirs in zip(frames, expected, strict=True)]
    assert min(similar) > 0.9


@pytest.mark.parametrize(("count", "window", "margin"), [(1, 50, 10), (50, 50, 10), (51, 50, 10), (500, 50, 24), (97, 3, 1)])
def test_windows_are_no_longer_than_asked(count: int, window: int, margin: int) -> None:
    cut = windows(count, window, margin)
    kept = [frame for _, _, start, stop in cut for frame in range(start, stop)]
    assert kept == list(range(count))
    assert all(first <= start < stop <= last and last - first <= window for first, last, start, stop in cut)


def test_wav2vec2_layers_are_torchaudios_own(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = torchaudio.models.wav2vec2_base(aux_num_out=5).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    waveform = tone(300, 0.6)
    with torch.inference_mode():
        expected = model.extract_features(torch.from_numpy(waveform)[None])[0]
    for layer in (1, 12):
        (frames,) = Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path / "w.pt", layer=layer)).extract([waveform])
        assert np.array_equal(frames, expected[layer - 1][0].to(torch.float16).numpy())


def test_unfit_extractors_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        ({"name": "logmle"}, r'did you mean "logmel"'),
        ({"name": "logmel", "weights": tmp_path}, 'unknown key "weights"'),
        ({"name": "wav2vec2"}, "it needs a checkpoint"),
        ({"name": "wav2vec2", "weights": tmp_path / "none.pt"}, "no such file"),
        ({"name": "wav2vec2", "weights": tmp_path / "other.pt"}, "not a torchaudio wav2vec"),
        ({"name": "wav2vec2", "weights": tmp_path / "folder"}, "not a wav2vec 2.0 folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            choose("audio", arguments.pop("name"), arguments).build("cpu")
        assert "\n" not in str(error.value)


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "conv_dim": [16] * 7,
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip


@pytest.mark.parametrize("kind", ["WavLM", "Hubert", "Data2VecAudio", "UniSpeech", "Bert", "Whisper"])
def test_folders_of_other_models_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    import transformers

    if kind in ("Bert", "Whisper"):
        getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    else:
        config = getattr(transformers, f"{kind}Config")(**_SMALL)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    model_type = json.loads((tmp_path / "config.json").read_text())["model_type"]
    with pytest.raises(UserError, match=f"not a wav2vec 2.0 folder: model_type in its config.json is '{model_type}'"):
        Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path))


def test_a_config_and_weights_that_disagree_are_one_line(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, WavLMConfig, WavLMModel

    Wav2Vec2ForCTC(Wav2Vec2Config(**_SMALL)).save_pretrained(tmp_path)
    assert Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path)).dim == 32, "the head of recognition is no remainder"
    fields = json.loads((tmp_path / "config.json").read_text())
    for change, reason in (
        ({"hidden_size": 16, "num_attention_heads": 2}, r"is \[.*32.*\], not \["),
        ({"num_hidden_layers": 1}, "which has no encoder.layers.1"),
        ({"num_hidden_layers": 3}, "its weights lack encoder.layers.2"),
        ({"hidden_size": 33}, "config.json cannot be used|does not fit"),
        ({"_attn_implementation": "someone/repo"}, ""),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**fields, **change}))
        if not reason:
            assert Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path)).dim == 32, "no code is looked for on a hub"
            continue
        with pytest.raises(UserError, match=reason) as error:
            Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path))
        assert "\n" not in str(error.value)
    WavLMModel(WavLMConfig(**_SMALL)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))  # what lies about itself is found by its weights
    with pytest.raises(UserError, match=r"which has no encoder\.layers\.0\.attention\.gru"):
        Wav2Vec2Extractor(Wav2Vec2Options(weights=tmp_path))


def test_audio_files_that_are_cut_off_or_chained_are_errors(tmp_path: Path) -> None:
    cut = {"a.wav": ("WAV", "PCM_16"), "gsm.wav": ("WAV", "GSM610"), "a.rf64": ("RF64", "PCM_16"), "a.w64": ("W64", "PCM_16"),
           "a.aiff": ("AIFF", "PCM_16"), "a.au": ("AU", "PCM_16"), "a.caf": ("CAF", "PCM_16"), "a.flac": ("FLAC", "PCM_16"),
           "a.ogg": ("OGG", "VORBIS"), "a.opus": ("OGG", "OPUS"), "a.mp3": ("MP3", "MPEG_LAYER_III")}  # fmt: skip
    for name, (form, codec) in cut.items():
        soundfile.write(tmp_path / name, tone(440, 2, 16000), 16000, format=form, subtype=codec)
        content = (tmp_path / name).read_bytes()
        assert abs(len(audio_of(tmp_path / name)) - 32000) < 400, name
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DecodingError, match="truncated"):
            audio_of(tmp_path / name)
    soundfile.write(tmp_path / "whole.ogg", tone(440, 1, 16000), 16000)
    (tmp_path / "chained.ogg").write_bytes((tmp_path / "whole.ogg").read_bytes() * 2)
    with pytest.raises(DecodingError, match="several streams one after another"):
        audio_of(tmp_path / "chained.ogg")


def test_audio_files_without_a_length_and_with_tags_are_whole(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(440, 1, 16000), 16000)
    wav, whole = (tmp_path / "a.wav").read_bytes(), audio_of(tmp_path / "a.wav")
    place = wav.index(b"data") + 4
    for size in (0, 0xFFFFFFFF, 0x7FFFF000, 0x80000000):  # as ffmpeg, sox and arecord write to a pipe
        piped = wav[:4] + struct.pack("<I", size) + wav[8:place] + struct.pack("<I", size) + wav[place + 4 :]
        (tmp_path / "piped.wav").write_bytes(piped)
        assert audio_of(tmp_path / "piped.wav").tobytes() == whole.tobytes()
    (tmp_path / "list.wav").write_bytes(wav + b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert audio_of(tmp_path / "list.wav").tobytes() == whole.tobytes()
    soundfile.write(tmp_path / "a.mp3", tone(440, 1, 16000), 16000, bitrate_mode="CONSTANT")
    mp3, whole = (tmp_path / "a.mp3").read_bytes(), audio_of(tmp_path / "a.mp3")
    tagged = {"before.mp3": b"ID3\x03\0\0\0\0\x02\0" + bytes(256) + mp3, "after.mp3": mp3 + b"TAG" + bytes(125)}
    for name, content in tagged.items():
        (tmp_path / name).write_bytes(content)
        assert audio_of(tmp_path / name).tobytes() == whole.tobytes(), name


def test_only_the_listed_containers_and_codecs_are_taken(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.aiff", tone(440, 1, 16000), 16000, subtype="DWVW_16")
    soundfile.write(tmp_path / "a.voc", tone(440, 1, 16000), 16000, format="VOC")
    for name, reason in (("a.aiff", "DWVW_16.*not accepted"), ("a.voc", "none of the WAV|accepted are WAV")):
        with pytest.raises(DecodingError, match=reason):
            audio_of(tmp_path / name)
