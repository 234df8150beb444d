"""The tasks that a sample can be trained on, one per file (see `opt_ds.tasks.base`)."""

#: This is the order in which a step's samples are assigned to tasks, and in which the model computes their losses.
BUILT_IN = {
    "mlm": "opt_ds.tasks.mlm:MaskedLanguageModeling",
    "mvm": "opt_ds.tasks.mvm:MaskedVisionModeling",
    "mam": "opt_ds.tasks.mam:MaskedAudioModeling",
    "modality": "opt_ds.tasks.reconstruct:ModalityReconstruction",
    "matching": "opt_ds.tasks.matching:Matching",
    "write": "opt_ds.tasks.write:TextWriting",
    "labels": "opt_ds.tasks.labels:LabelPrediction",
    "alignment": "opt_ds.tasks.alignment:Alignment",
}
