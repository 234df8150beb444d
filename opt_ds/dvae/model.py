"""The discrete VAE (stage 1 of the image decoder). It encodes a 64×64 image to 8×8 codes and decodes codes to an image.

It follows Ramesh et al. 2021 (DALL·E, arXiv 2102.12092, §2.1). The encoder outputs logits over a codebook at each of
the 64 positions. Training maximises the ELBO with a Gumbel-softmax relaxation (Jang et al. 2016, arXiv 1611.01144) of
falling temperature and a KL term to the uniform prior over codes. Inference takes the argmax.

Architecture and initialisation differ, so that two CPU cores are enough for a small corpus:
- Both networks work on 8×8-pixel patches folded into channels (space-to-depth), never at full resolution.
- Codes are vectors in patch space. Without its network, the encoder's logit of code k for patch p is
  (p·c_k − ‖c_k‖²/2) / σ². Up to a constant this is the log-posterior of an equal-weight mixture of Gaussians at
  centroids c_k. Initialised with k-means centroids, the model *is* a vector quantiser of patches in which every code is
  used. The networks around it end in zero-initialised layers, so they contribute nothing at first and learn context end
  to end.

Shape letters: n images, c channels, h/w pixels, d = 192 patch values, y/x the 8×8 grid, s = 64 positions, k codes.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opt_ds.config.dvae import DVAE_PRESETS, DVAEConfig
from opt_ds.errors import UserError
from opt_ds.ops.kmeans import kmeans
from opt_ds.store.dvae import CONFIG_FILE, WEIGHTS_FILE, dvae_fingerprint, read_dvae_folder
from opt_ds.store.files import follow_umask
from opt_ds.store.seal import seal_folder

__all__ = ["DVAE_PRESETS", "DVAEConfig", "DVAELosses", "DiscreteVAE"]

IMAGE_SIZE = 64
PATCH_SIZE = 8
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE
NUM_POSITIONS = GRID_SIZE**2
PATCH_DIM = 3 * PATCH_SIZE**2
COARSE_SIZE = 4  # pixels per side of the areas whose means `coarse_weight` compares


class DVAELosses(NamedTuple):
    """Losses of one batch, float32 scalars: `loss` to minimise, `mse` of pixels in 0..1, `kl` in nats per position."""

    loss: Tensor
    mse: Tensor
    kl: Tensor


class DiscreteVAE(nn.Module):
    """Encoder, codebook and decoder.

    Images are uint8 [n, 3, 64, 64], or float in 0..1. Codes are int64 [n, 64], in row-major order of the 8×8 grid.
    """

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PatchNet(config.encoder_width, config.encoder_blocks)
        self.decoder = PatchNet(config.decoder_width, config.decoder_blocks)
        self.keys_kd = nn.Parameter(torch.empty(config.codebook_size, PATCH_DIM))
        self.key_bias_k = nn.Parameter(torch.empty(config.codebook_size))
        self.codebook_kd = nn.Parameter(torch.empty(config.codebook_size, PATCH_DIM))
        self._start_at(torch.empty(config.codebook_size, PATCH_DIM).uniform_(-0.5, 0.5))

    @torch.no_grad()
    def start_from_patches(self, patches_md: Tensor, generator: torch.Generator) -> None:
        """Initialise the codebook with k-means centroids of patches.

        `patches_md` is float [m >= codebook_size, 192], patches as `fold` makes them.
        """
        patches_md = patches_md.to(self.codebook_kd)
        self._start_at(kmeans(patches_md, self.config.codebook_size, self.config.kmeans_iterations, generator))

    @torch.no_grad()
    def _start_at(self, centroids_kd: Tensor) -> None:
        sigma = self.config.encoder_sigma
        self.codebook_kd.copy_(centroids_kd)
        self.keys_kd.copy_(centroids_kd / sigma)
        self.key_bias_k.copy_(-centroids_kd.square().sum(1) / (2 * sigma**2))

    def encode_logits(self, pixels_nchw: Tensor) -> Tensor:
        """Return the logits over the codebook, float32 [n, 64, k]."""
        return self._logits(fold(pixels_nchw))

    @torch.no_grad()
    def encode(self, pixels_nchw: Tensor) -> Tensor:
        """Return the most probable codes, int64 [n, 64], on the model's device.

        Images on another device are moved there.
        """
        return self.encode_logits(pixels_nchw.to(self.codebook_kd.device)).argmax(-1)

    @torch.no_grad()
    def decode(self, codes_ns: Tensor) -> Tensor:
        """Decode codes (any integer type, any device) to images on the model's device.

        The result is float32 [n, 3, 64, 64] in 0..1.
        """
        codes_ns = codes_ns.to(self.codebook_kd.device, torch.int64)
        return unfold(self._generate(F.embedding(codes_ns, self.codebook_kd))).clamp(0.0, 1.0)

    def forward(
        self,
        pixels_nchw: Tensor,
        temperature: float,
        kl_weight: float,
        generator: torch.Generator,
        straight_through: bool = False,
    ) -> DVAELosses:
        """Compute the losses with relaxed codes.

        loss = −ELBO per pixel value without its constant = mse / (2 σ²) + kl_weight · 64/12288 · kl, for a Gaussian
        likelihood with σ = `pixel_sigma`; kl = Σ_k q log(q K), averaged over positions. `l1_weight` adds its part.

        Args:
            pixels_nchw: Images [n, 3, 64, 64], uint8 or float in 0..1.
            temperature: Temperature of the Gumbel-softmax.
            kl_weight: Weight of the KL term.
            generator: Generator of the Gumbel noise, on the device of the images.
            straight_through: Feed the one-hot argmax of the sample to the decoder, with the gradient of the relaxation.

        Returns:
            The losses of the batch.
        """
        patches_ndyx = fold(pixels_nchw)
        logits_nsk = self._logits(patches_ndyx)
        sample_nsk = gumbel_softmax(logits_nsk, temperature, generator, straight_through)
        loss, mse = self._reconstruction_loss(self._generate(sample_nsk @ self.codebook_kd), patches_ndyx)
        kl = kl_to_uniform(logits_nsk).mean()
        return DVAELosses(loss + kl_weight * kl / PATCH_DIM, mse, kl.detach())

    def decoder_losses(self, pixels_nchw: Tensor, codes_ns: Tensor) -> DVAELosses:
        """Compute the losses of decoding fixed codes, with kl 0.

        This is temperature 0 with a frozen encoder, without the cost of the encoder.
        """
        loss, mse = self._reconstruction_loss(self._generate(F.embedding(codes_ns, self.codebook_kd)), fold(pixels_nchw))
        return DVAELosses(loss, mse, torch.zeros_like(mse))

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that determine the codes of an image."""
        return [*self.encoder.parameters(), self.keys_kd, self.key_bias_k]

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprint: name, codebook size and SHA-256 of the weights.

        It links codes to the dVAE that made them.
        """
        return dvae_fingerprint(self.config, self.state_dict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`. Create the folder if necessary."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS_FILE)
        follow_umask(folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config.model_dump(), indent=1) + "\n", encoding="utf-8")
        seal_folder(folder, (CONFIG_FILE, WEIGHTS_FILE))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "DiscreteVAE":
        """Load the output of `save_pretrained` on the CPU, in evaluation mode.

        Raise UserError if it is missing or damaged. Before the model is built, the files are compared with their
        recorded hashes and the weights' sizes with config.json.
        """
        folder = Path(folder)
        config, shapes = read_dvae_folder(folder)
        if _least_weights(config) > sum(math.prod(shape) for shape in shapes.values()):
            problem = f"asks for more weights than {WEIGHTS_FILE} holds"
            raise UserError(f"{folder / CONFIG_FILE}: {problem}: restore it, or train it again")
        dvae = cls(config)
        own = {name: tuple(tensor.shape) for name, tensor in dvae.state_dict().items()}
        if shapes != own:
            first = min(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
            raise UserError(f"{folder}: damaged or foreign dVAE ({first} has another shape): train it again")
        dvae.load_state_dict(load_file(folder / WEIGHTS_FILE))
        return dvae.eval()

    def _logits(self, patches_ndyx: Tensor) -> Tensor:
        features_ndyx = patches_ndyx + self.encoder(patches_ndyx)
        features_nsd = features_ndyx.flatten(2).transpose(1, 2) / self.config.encoder_sigma
        # Logits reach thousands, where the spacing of bf16 is 8. That is too coarse to distinguish neighbouring codes.
        with torch.autocast(patches_ndyx.device.type, enabled=False):
            return features_nsd.float() @ self.keys_kd.T + self.key_bias_k

    def _generate(self, values_nsd: Tensor) -> Tensor:
        base_ndyx = values_nsd.float().transpose(1, 2).unflatten(2, (GRID_SIZE, GRID_SIZE))
        return base_ndyx + self.decoder(base_ndyx).float()

    def _reconstruction_loss(self, generated_ndyx: Tensor, patches_ndyx: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction loss, and the squared error without a gradient."""
        mse = F.mse_loss(generated_ndyx, patches_ndyx)
        loss = mse / (2 * self.config.pixel_sigma**2)
        if self.config.l1_weight:
            loss = loss + self.config.l1_weight * F.l1_loss(generated_ndyx, patches_ndyx) / self.config.pixel_sigma
        if self.config.coarse_weight:
            coarse = F.mse_loss(coarse_means(generated_ndyx), coarse_means(patches_ndyx))
            loss = loss + self.config.coarse_weight * coarse / (2 * self.config.pixel_sigma**2)
        return loss, mse.detach()


class PatchNet(nn.Module):
    """Residual convolutional network on the 8×8 grid of patches, [n, 192, 8, 8] -> [n, 192, 8, 8].

    Initially its output is 0.
    """

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(PATCH_DIM, width, 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))
        self.head = zeroed(nn.Conv2d(width, PATCH_DIM, 1))

    def forward(self, patches_ndyx: Tensor) -> Tensor:
        """Return [n, 192, 8, 8] for patches [n, 192, 8, 8]."""
        hidden = self.stem(patches_ndyx)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(F.gelu(hidden))


class ResidualBlock(nn.Module):
    """Residual block x + W₁ₓ₁ gelu(W₃ₓ₃ gelu(x)); initially the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1)
        self.out = zeroed(nn.Conv2d(width, width, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [n, width, 8, 8] for hidden [n, width, 8, 8]."""
        return hidden + self.out(F.gelu(self.mix(F.gelu(hidden))))


def _least_weights(config: DVAEConfig) -> int:
    """Return a lower bound of the number of weights of this configuration."""
    nets = ((config.encoder_width, config.encoder_blocks), (config.decoder_width, config.decoder_blocks))
    return 2 * config.codebook_size * PATCH_DIM + sum(10 * blocks * width * width + PATCH_DIM * width for width, blocks in nets)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Set a layer's weight and bias to zero and return it."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def fold(pixels_nchw: Tensor) -> Tensor:
    """Convert images, uint8 or float in 0..1, to patches in −0.5..0.5: float32 [n, 192, 8, 8]."""
    scale = 255.0 if pixels_nchw.dtype == torch.uint8 else 1.0
    return F.pixel_unshuffle(pixels_nchw.float() / scale - 0.5, PATCH_SIZE)


def unfold(patches_ndyx: Tensor) -> Tensor:
    """Invert `fold` for float images: return [n, 3, 64, 64] in 0..1 (not clamped)."""
    return F.pixel_shuffle(patches_ndyx, PATCH_SIZE) + 0.5


def coarse_means(patches_ndyx: Tensor) -> Tensor:
    """Return the means of 4 x 4 pixels of patches [n, 192, 8, 8]: [n, 3, 16, 16]."""
    return F.avg_pool2d(F.pixel_shuffle(patches_ndyx, PATCH_SIZE), COARSE_SIZE)


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator, straight_through: bool) -> Tensor:
    """Return softmax((logits + g) / temperature) over the last dimension, g ~ Gumbel(0, 1) (arXiv 1611.01144).

    As the temperature approaches 0, the result approaches a one-hot sample from softmax(logits).

    Args:
        logits: Logits [..., k].
        temperature: Temperature, positive.
        generator: Generator of the noise, on the device of the logits.
        straight_through: Return the one-hot argmax in the forward pass, with the gradient of the relaxation.

    Returns:
        [..., k], in the dtype of the softmax.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
    gumbel = -torch.log(-torch.log(uniform.clamp_(1e-12, 1 - 2**-24)))
    relaxed = ((logits + gumbel) / temperature).softmax(-1)
    if not straight_through:
        return relaxed
    one_hot = F.one_hot(relaxed.argmax(-1), relaxed.shape[-1]).to(relaxed.dtype)
    return one_hot + relaxed - relaxed.detach()


def kl_to_uniform(logits: Tensor) -> Tensor:
    """Return KL(softmax(logits) ‖ uniform) = Σ_k q_k log(q_k K) in nats, over the last dimension."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q + math.log(logits.shape[-1]))).sum(-1)


def psnr_db(mean_squared_error: float) -> float:
    """Return 10 log10(1 / mse) in dB, for pixels in 0..1; infinity for an mse of 0."""
    return math.inf if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)
