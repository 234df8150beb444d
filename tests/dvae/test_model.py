"""Test the dVAE: codes and images, the relaxation and its losses against float64, k-means, saving."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.config.dvae import DVAEConfig, load_dvae_config, schedule
from opt_ds.dvae.model import (
    DVAE_PRESETS,
    DiscreteVAE,
    coarse_means,
    fold,
    gumbel_softmax,
    kl_to_uniform,
    psnr_db,
    unfold,
)
from opt_ds.errors import UserError

TINY = DVAE_PRESETS["dvae-tiny"]


def make_dvae(config: DVAEConfig = TINY, trained: bool = False) -> DiscreteVAE:
    """A dVAE of random weights; `trained`: the nets' zero heads are random too."""
    torch.manual_seed(0)
    dvae = DiscreteVAE(config)
    if trained:
        for parameter in dvae.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return dvae.eval()


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("codebook_size", [32, 8192])
def test_every_code_at_its_position_survives_decoding_and_encoding(codebook_size: int) -> None:
    """Freshly started, the dVAE is a vector quantiser: decoding codes and encoding the result returns the codes."""
    dvae = make_dvae(TINY.model_copy(update={"codebook_size": codebook_size}))
    codes = torch.arange(max(codebook_size, 64 * 32)).reshape(-1, 64) % codebook_size
    assert (dvae.encode(dvae.decode(codes)) == codes).all()
    assert dvae.encode(images(3)).shape == (3, 64)
    assert dvae.encode(images(3)).dtype == torch.int64


def test_codes_are_row_major_over_the_grid() -> None:
    dvae = make_dvae()
    codes = torch.zeros(1, 64, dtype=torch.int64)
    codes[0, 8 * 2 + 5] = 7  # grid row 2, column 5
    difference = (dvae.decode(codes) - dvae.decode(torch.zeros_like(codes))).abs().amax((0, 1))
    rows, columns = difference.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 23, 40, 47)


def test_uint8_and_float_images_mean_the_same_and_folding_is_invertible() -> None:
    dvae, shown = make_dvae(trained=True), images(2)
    assert torch.equal(dvae.encode_logits(shown), dvae.encode_logits(shown.float() / 255))
    assert torch.allclose(unfold(fold(shown)), shown.float() / 255, atol=1e-6)


def test_initial_logits_are_the_posterior_of_a_gaussian_mixture() -> None:
    dvae, shown = make_dvae(), images(1)
    patches = fold(shown).flatten(2).transpose(1, 2)[0].double()
    distance = torch.cdist(patches, dvae.codebook_kd.double()).square()
    expected = (-distance / (2 * TINY.encoder_sigma**2)).log_softmax(-1)
    assert torch.allclose(dvae.encode_logits(shown)[0].double().log_softmax(-1), expected, atol=2e-3)


def test_relaxed_loss_approaches_the_hard_one_at_low_temperature() -> None:
    """With logits far apart and a low temperature, the decoder sees the argmax codes that inference uses."""
    config = TINY.model_copy(update={"encoder_sigma": 0.02})
    dvae, shown = make_dvae(config, trained=True), images(4)
    relaxed = dvae(shown, temperature=1e-3, kl_weight=0.0, generator=keyed(1))
    hard = dvae.decoder_losses(shown, dvae.encode(shown))
    assert relaxed.mse.item() == pytest.approx(hard.mse.item(), rel=1e-4)
    assert relaxed.loss.item() == pytest.approx(hard.loss.item(), rel=1e-4)
    hot = dvae(shown, temperature=1e4, kl_weight=0.0, generator=keyed(1))
    assert hot.mse.item() != pytest.approx(hard.mse.item(), rel=1e-2)


def test_gumbel_softmax_becomes_one_hot_samples_of_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0]).expand(20_000, 4)
    sample = gumbel_softmax(logits, 1e-4, keyed(3), straight_through=False)
    assert (sample.amax(-1) > 0.999).double().mean() > 0.99
    share = sample.round().mean(0)
    assert torch.allclose(share, logits[0].softmax(-1), atol=0.015)
    flat = gumbel_softmax(logits, 1e4, keyed(3), straight_through=False)
    assert torch.allclose(flat, torch.full_like(flat, 0.25), atol=1e-2)


def test_straight_through_shows_one_hots_and_keeps_the_relaxed_gradient() -> None:
    logits = torch.randn(50, 6, generator=keyed(0))
    weight = torch.randn(6, generator=keyed(1))
    gradients = []
    for straight_through in (False, True):
        leaf = logits.clone().requires_grad_()
        sample = gumbel_softmax(leaf, 0.7, keyed(2), straight_through)
        (sample @ weight).sum().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(sample.amax(-1), torch.ones(50)) and torch.allclose(sample.sum(-1), torch.ones(50))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@given(st.integers(2, 40), st.floats(0.01, 300), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_kl_to_uniform_equals_float64(num_codes: int, scale: float, seed: int) -> None:
    logits = scale * np.random.default_rng(seed).standard_normal((5, num_codes))
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    q = weight / weight.sum(-1, keepdims=True)
    expected = (q * np.log(np.where(q > 0, q * num_codes, 1.0))).sum(-1)
    actual = kl_to_uniform(torch.from_numpy(logits).float()).double().numpy()
    np.testing.assert_allclose(actual, expected, atol=2e-4, rtol=2e-4)
    assert kl_to_uniform(torch.zeros(num_codes)).item() == pytest.approx(0.0, abs=1e-5)


def test_loss_is_the_negative_elbo_per_value_and_reaches_every_parameter() -> None:
    dvae, shown = make_dvae(TINY.model_copy(update={"encoder_sigma": 3.0}), trained=True), images(2)
    losses = dvae(shown, temperature=0.9, kl_weight=0.7, generator=keyed(5))
    logits = dvae.encode_logits(shown)
    relaxed = gumbel_softmax(logits, 0.9, keyed(5), straight_through=False)
    base = (relaxed @ dvae.codebook_kd).transpose(1, 2).reshape(2, 192, 8, 8)
    generated = unfold(base + dvae.decoder(base)).double()
    error = (generated - shown.double() / 255).square().sum() / (2 * TINY.pixel_sigma**2)
    elbo = -error - 0.7 * kl_to_uniform(logits.double()).sum()
    assert losses.loss.item() == pytest.approx(-elbo.item() / shown.numel(), rel=1e-5)
    assert losses.kl.item() > 0.01
    losses.loss.backward()
    assert [name for name, p in dvae.named_parameters() if p.grad is None or not p.grad.abs().any()] == []


def test_psnr_formula() -> None:
    error = np.random.default_rng(0).random((3, 64, 64))
    assert psnr_db(float((error**2).mean())) == pytest.approx(20 * math.log10(1 / np.sqrt((error**2).mean())))
    assert psnr_db(0.01) == pytest.approx(20.0)
    assert psnr_db(0.0) == math.inf


def test_save_and_load_keep_codes_images_and_identity(tmp_path: Path) -> None:
    dvae, shown = make_dvae(trained=True), images(2)
    dvae.save_pretrained(tmp_path / "dvae")
    loaded = DiscreteVAE.from_pretrained(tmp_path / "dvae")
    assert loaded.config == dvae.config and loaded.fingerprint() == dvae.fingerprint()
    assert torch.equal(loaded.decode(loaded.encode(shown)), dvae.decode(dvae.encode(shown)))
    loaded.codebook_kd.data[0, 0] += 1e-6
    assert loaded.fingerprint() != dvae.fingerprint()
    assert loaded.fingerprint()["num_codes"] == 32


def test_missing_and_damaged_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trained dVAE there"):
        DiscreteVAE.from_pretrained(tmp_path / "none")
    folder = tmp_path / "dvae"
    make_dvae().save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="damaged"):
        DiscreteVAE.from_pretrained(folder)


def test_mistakes_in_the_configuration_are_one_line(tmp_path: Path) -> None:
    for arguments, message in [
        (("dvae-emojy",), 'preset "dvae-emojy" is unknown .did you mean "dvae-emoji"'),
        (("dvae-tiny", None, ("codebok_size=3",)), 'unknown key "codebok_size" .did you mean "codebook_size"'),
        (("dvae-tiny", None, ("batch_size=0",)), "dVAE config dvae-tiny: batch_size: must be at least 1 .found 0"),
        (("dvae-tiny", None, ("batch_size",)), "write it as key.path=value"),
        (("dvae-tiny", None, ("clip_norm=.nan",)), "clip_norm: must be more than 0"),
        (("dvae-tiny", None, ("learning_rate=.inf",)), "learning_rate: must be a finite number"),
        (("dvae-tiny", None, ("kmeans_patches=8",)), "below codebook_size 32"),
        (("dvae-tiny", tmp_path / "gone.yaml"), r'gone.yaml" is neither a preset \(dvae-base, dvae-emoji, .*\) nor a file'),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_dvae_config(*arguments)
        assert "\n" not in str(caught.value)
    (tmp_path / "c.yaml").write_text("batch_size: 3\nsteps: 5\n")
    config = load_dvae_config("dvae-tiny", tmp_path / "c.yaml", ("steps=6",), steps=7)
    assert (config.batch_size, config.steps, config.codebook_size) == (3, 7, 32)
    assert load_dvae_config("dvae-base").codebook_size == 8192
    assert load_dvae_config("dvae-tiny", None, ("clip_norm=.inf",)).clip_norm == math.inf  # no clipping, as runs may have it


def test_a_configuration_file_may_name_its_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: dvae-tiny\nbatch_size: 3\n")
    for preset in (None, "dvae-tiny"):
        config = load_dvae_config(preset, file)
        assert (config.batch_size, config.codebook_size) == (3, 32)
    with pytest.raises(UserError, match=r"--preset dvae-base: .*c.yaml starts from preset dvae-tiny: omit --preset"):
        load_dvae_config("dvae-base", file)
    file.write_text("preset: dvae-tny\n")
    with pytest.raises(UserError, match=r'unknown preset "dvae-tny" .did you mean "dvae-tiny"'):
        load_dvae_config(None, file)


def test_schedules_start_cool_and_end_as_configured() -> None:
    config = DVAEConfig(steps=1000, soft_fraction=0.5, anneal_fraction=0.8, kl_weight=2.0, straight_through_fraction=0.1)
    plan = [schedule(config, step) for step in range(config.steps)]
    assert [settings.soft for settings in plan] == [True] * 500 + [False] * 500
    assert plan[0].temperature == config.temperature_start
    assert plan[400].temperature == pytest.approx(config.temperature_end)
    temperatures = [settings.temperature for settings in plan]
    assert temperatures == sorted(temperatures, reverse=True)
    assert plan[0].kl_weight == 0.0 and plan[125].kl_weight == pytest.approx(2.0)
    assert not plan[449].straight_through and plan[451].straight_through
    assert max(settings.learning_rate for settings in plan) <= config.learning_rate
    assert plan[-1].learning_rate < 1e-4 * config.learning_rate


def test_coarse_means_are_those_of_pixels() -> None:
    pixels = images(2).double() / 255
    means = coarse_means(fold(pixels))
    assert means.shape == (2, 3, 16, 16)
    for row, column in ((0, 0), (1, 2), (15, 15)):
        block = pixels[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        torch.testing.assert_close(means[:, :, row, column], (block.mean((2, 3)) - 0.5).float())


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_the_error_of_coarse_means_is_added_with_its_weight(weight: float) -> None:
    dvae, true = make_dvae(TINY.model_copy(update={"coarse_weight": weight, "pixel_sigma": 0.2}), trained=True), images(2)
    codes = dvae.encode(true)
    with torch.no_grad():
        found = dvae.decoder_losses(true, codes)
        error = (unfold(dvae._generate(dvae.codebook_kd[codes])) - true / 255.0).double()
    means = error.unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean((3, 5))
    expected = (error.square().mean() + weight * means.square().mean()).item() / (2 * 0.2**2)
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    assert found.mse.item() == pytest.approx(error.square().mean().item(), rel=1e-5), "the PSNR stays that of pixels"


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_absolute_error_is_added_with_its_weight(weight: float) -> None:
    dvae, true = make_dvae(TINY.model_copy(update={"l1_weight": weight, "pixel_sigma": 0.2}), trained=True), images(2)
    codes = dvae.encode(true)
    with torch.no_grad():
        found = dvae.decoder_losses(true, codes)
        error = (unfold(dvae._generate(dvae.codebook_kd[codes])) - true / 255.0).double()
        relaxed = dvae(true, 0.5, 0.0, keyed(3))
        plain = make_dvae(TINY.model_copy(update={"pixel_sigma": 0.2}), trained=True)(true, 0.5, 0.0, keyed(3))
    mse, mae = error.square().mean().item(), error.abs().mean().item()
    assert found.mse.item() == pytest.approx(mse, rel=1e-5)
    assert found.loss.item() == pytest.approx(mse / (2 * 0.2**2) + weight * mae / 0.2, rel=1e-5)
    assert relaxed.mse.item() == plain.mse.item()
    assert (relaxed.loss.item() > plain.loss.item() * 1.01) == (weight > 0)
