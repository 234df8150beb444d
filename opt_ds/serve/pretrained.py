"""The former name of `opt_ds.serving.pretrained`, which the cards of exported models name; goes with the next release."""

import warnings

from opt_ds.serving.pretrained import OmniPerceptionConfig, OPTModel

__all__ = ["OPTModel", "OmniPerceptionConfig"]

warnings.warn("opt_ds.serve.pretrained is opt_ds.serving.pretrained now", FutureWarning, stacklevel=2)
