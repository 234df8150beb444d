"""Numbers of the built-in modalities: columns of a store's rows and of every array over the modalities.

Modalities of other packages follow, in the order of `model.plugins`.
"""

TEXT, IMAGE, AUDIO = MODALITIES = (0, 1, 2)
#: Input modalities by the letters used in tables.
SUBSETS = {"T": (TEXT,), "I": (IMAGE,), "A": (AUDIO,), "T+I": (TEXT, IMAGE), "T+A": (TEXT, AUDIO), "A+I": (AUDIO, IMAGE),
           "T+A+I": (TEXT, AUDIO, IMAGE)}  # fmt: skip
