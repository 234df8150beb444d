"""Train the dVAE and write its codes into the store. Started by path; the same as `opt-ds train-dvae`:

python opt_ds/train_dvae.py --store DIR --output DIR
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python put this folder first on its search path, where our modules would shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from opt_ds.cli.dvae import main

if __name__ == "__main__":
    main()
