"""Small encoders with random weights, in folders as transformers and timm publish them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CLIP_COLOURS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET_COLOURS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF_COLOURS = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
_SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
_VISION = {**_SIZES, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
_CLIP_INPUT = {  # the form of openai/clip-vit-base-patch32
    "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 36,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_COLOURS[0], "image_std": CLIP_COLOURS[1],
}  # fmt: skip
_SIGLIP_INPUT = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": HALF_COLOURS[0], "image_std": HALF_COLOURS[1],
    "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor", "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"height": 32, "width": 32},
}  # fmt: skip
_DINO_INPUT = {
    "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": IMAGENET_COLOURS[0], "image_std": IMAGENET_COLOURS[1],
    "image_processor_type": "BitImageProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 37},
}  # fmt: skip
_DINOV3_INPUT = {
    "crop_size": None, "do_center_crop": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": IMAGENET_COLOURS[0], "image_std": IMAGENET_COLOURS[1], "image_processor_type": "DINOv3ViTImageProcessorFast",
    "resample": 2, "rescale_factor": 0.00392156862745098, "size": {"height": 32, "width": 32},
}  # fmt: skip
_NAFLEX_INPUT = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": HALF_COLOURS[0], "image_std": HALF_COLOURS[1],
    "image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 20, "patch_size": 8, "resample": 2,
}  # fmt: skip
_VIT_INPUT = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.4] * 3, "size": 32}
#: Name -> (class, configuration's class, its values, preprocessor_config.json, tokens before the patches).
VISION = {
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": _TEXT, "vision_config": _VISION}, _CLIP_INPUT, 1),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", _VISION, _CLIP_INPUT, 1),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": _TEXT, "vision_config": _VISION}, _SIGLIP_INPUT, 0),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipVisionConfig", _VISION, _SIGLIP_INPUT, 0),
    "siglip2": (
        "Siglip2Model", "Siglip2Config",
        {"text_config": _TEXT, "vision_config": {**_SIZES, "intermediate_size": 32, "num_patches": 16, "patch_size": 8}},
        _NAFLEX_INPUT, 0,
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**_SIZES, "mlp_ratio": 2, "image_size": 48, "patch_size": 8}, _DINO_INPUT, 1),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
        {**_SIZES, "mlp_ratio": 2, "image_size": 48, "patch_size": 8, "num_register_tokens": 3}, _DINO_INPUT, 4,
    ),
    "dinov3_vit": (
        "DINOv3ViTModel", "DINOv3ViTConfig", {**_SIZES, "intermediate_size": 32, "image_size": 32, "patch_size": 8,
                                              "num_register_tokens": 3}, _DINOV3_INPUT, 4,
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION, _VIT_INPUT, 1),
}  # fmt: skip
_AUDIO = {
    **_SIZES, "intermediate_size": 32, "conv_dim": [12] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_WAVEFORM_INPUT = {
    "do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "padding_side": "right",
    "padding_value": 0.0, "return_attention_mask": True, "sampling_rate": 16000,
}  # fmt: skip
_FILTER_BANK_INPUT = {
    "feature_extractor_type": "SeamlessM4TFeatureExtractor", "feature_size": 80, "num_mel_bins": 80, "padding_side": "right",
    "padding_value": 1, "return_attention_mask": True, "sampling_rate": 16000, "stride": 2,
}  # fmt: skip
_WHISPER_INPUT = {
    "chunk_length": 2, "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 80, "hop_length": 160,
    "n_fft": 400, "n_samples": 32000, "nb_max_frames": 200, "padding_side": "right", "padding_value": 0.0,
    "return_attention_mask": False, "sampling_rate": 16000,
}  # fmt: skip
_LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
_WHISPER = {
    "d_model": 24, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 99, "num_mel_bins": 80, "max_source_positions": 100,
    "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
#: Name -> (class, configuration's class, its values, preprocessor_config.json).
SPEECH = {
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", {**_AUDIO, **_LAYER_NORM}, _WAVEFORM_INPUT),
    "wav2vec2-group": ("Wav2Vec2Model", "Wav2Vec2Config", _AUDIO, {**_WAVEFORM_INPUT, "do_normalize": False}),
    "hubert": ("HubertModel", "HubertConfig", {**_AUDIO, **_LAYER_NORM}, _WAVEFORM_INPUT),
    "wavlm": ("WavLMModel", "WavLMConfig", _AUDIO, {**_WAVEFORM_INPUT, "do_normalize": False}),
    "data2vec-audio": (
        "Data2VecAudioModel", "Data2VecAudioConfig", {**_AUDIO, "num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5},
        _WAVEFORM_INPUT,
    ),
    "wav2vec2-bert": (
        "Wav2Vec2BertModel", "Wav2Vec2BertConfig",
        {**_SIZES, "intermediate_size": 32, "feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 5},
        _FILTER_BANK_INPUT,
    ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER, _WHISPER_INPUT),
}  # fmt: skip


def save_vision(name: str, folder: Path, **changes: Any) -> Path:
    """Save a vision model of `VISION` with its preprocessor_config.json; `changes` are to the latter."""
    kind, config, values, settings, _ = VISION[name]
    return _save(kind, config, values, {**settings, **changes}, folder)


def save_speech(name: str, folder: Path, config_changes: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Save a speech model of `SPEECH` with its preprocessor_config.json; `changes` are to the latter."""
    kind, config, values, settings = SPEECH[name]
    return _save(kind, config, {**values, **(config_changes or {})}, {**settings, **changes}, folder)


def _save(kind: str, config: str, values: dict[str, Any], settings: dict[str, Any], folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**values))
    randomise(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def save_timm(name: str, folder: Path, **arguments: Any) -> Path:
    """Save a model of timm as `config.json` and `model.safetensors`, with an input of 32 pixels."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5, **arguments)
    randomise(network)
    colours = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    data = {"input_size": (3, 32, 32), "crop_pct": 0.9, "interpolation": "bicubic", **colours}
    timm.models.save_for_hf(network, folder, safe_serialization=True, data_config=data)
    return folder


def randomise(model: torch.nn.Module) -> None:
    """Give every weight a size that matters: new models have position embeddings near 0 and norms that are the identity."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = weight.dim() == 1 and name.endswith("weight")
            weight.normal_(1.0 if norm else 0.0, 0.15 if weight.dim() == 2 else 0.2)


def image_of_seed(seed: int = 0, width: int = 80, height: int = 60) -> Image.Image:
    """Return smooth noise, in which every patch differs."""
    pixels = np.random.default_rng(seed).integers(0, 256, (max(2, height // 10), max(2, width // 10), 3), "uint8")
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Return noise whose loudness varies, with an offset, which normalisation removes."""
    random = np.random.default_rng(seed)
    count = int(seconds * 16_000)
    loudness = 0.1 + 0.1 * np.sin(np.arange(count) / 2_000)
    return (0.05 + loudness * random.standard_normal(count)).astype("float32")
