"""Feature extractors, one per file: raw files of one modality to features (see `opt_ds.features.extractors`)."""

#: Name -> class. The first one of a modality is its default.
BUILT_IN = {
    "grid": "opt_ds.features.grid:GridExtractor",
    "faster_rcnn": "opt_ds.features.detector:FasterRCNNExtractor",
    "vit": "opt_ds.features.vit:ViTExtractor",
    "hf_detector": "opt_ds.features.hf_detector:HFDetectorExtractor",
    "npz": "opt_ds.features.npz_regions:NpzExtractor",
    "region_files": "opt_ds.features.region_files:RegionFileExtractor",
    "logmel": "opt_ds.features.logmel:LogMelExtractor",
    "hf_speech": "opt_ds.features.hf_speech:HFSpeechExtractor",
    "wav2vec2": "opt_ds.features.wav2vec2:Wav2Vec2Extractor",
    "frame_files": "opt_ds.features.frame_files:FrameFileExtractor",
}
