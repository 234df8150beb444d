"""pretrain.py in fp16 on the CPU, which the product refuses as slow: here its arithmetic and resuming matter."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from opt_ds import pretrain
from opt_ds.training import deepspeed_config


def main() -> int:
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True
    deepspeed_config.choose_precision = lambda config, hardware: "fp16"
    return pretrain.main()


if __name__ == "__main__":
    sys.exit(main())
