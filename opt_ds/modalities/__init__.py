"""Modalities: one class per file."""

#: Name -> `module:Class`, in the order of their numbers (`opt_ds.data.modalities`).
BUILT_IN = {
    "text": "opt_ds.modalities.text:Text",
    "image": "opt_ds.modalities.image:Image",
    "audio": "opt_ds.modalities.audio:Audio",
}
