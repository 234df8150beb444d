"""The device that a command computes on, as `--device` names it."""

from opt_ds.errors import UserError


def choose_device(device: str) -> str:
    """Return "cuda" or "cpu" for "auto", "cuda" or "cpu". UserError for another word or an absent GPU."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f'--device "{device}": choose auto, cpu or cuda')
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no GPU: use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
