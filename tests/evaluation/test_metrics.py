"""PSNR and SSIM must be those of reference implementations in every protocol, and every metric must name itself."""

from __future__ import annotations

from itertools import pairwise
from math import isnan

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from refreward_trl.errors import ConfigError, DataError
from refreward_trl.evaluation.metrics import Metric, Sample, judge_identity, load_metric
from refreward_trl.evaluation.sr_benchmark import gradient_energy
from refreward_trl.resampling import downscale
from refreward_trl.rewards.fidelity import LRConsistency, image_psnr
from refreward_trl.rewards.heldout import HeldOutJudge
from refreward_trl.rewards.refreward import RefReward

SIZE = (44, 52)


def sample(noise: float = 20.0, *, seed: int = 0) -> Sample:
    """A smooth picture of 8-bit values, and the same with noise that is strongest at the border and in blue."""
    random = np.random.default_rng(seed)
    height, width = SIZE
    across, down = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    hr = 128 + 100 * np.stack([np.sin(across), np.cos(down), np.sin(across * down)])
    border = np.ones(SIZE)
    border[4:-4, 4:-4] = 0.5
    sr = hr + noise * border * random.normal(size=hr.shape) * np.array([0.5, 1.0, 2.0])[:, None, None]
    images = [torch.from_numpy(np.clip(np.rint(image), 0, 255) / 255).float()[None] for image in (sr, hr)]
    return Sample("photo", downscale(images[1], 4).clamp(0, 1), images[0], images[1])


def reference(image: torch.Tensor, colour: str, border: int) -> np.ndarray:
    """The image as scikit-image reads it, `(H, W, c)` in [0, 1], float64."""
    pixels = image[0].permute(1, 2, 0).double().numpy()
    pixels = rgb2ycbcr(pixels)[..., :1] / 255 if colour == "y" else pixels
    return pixels[border : pixels.shape[0] - border, border : pixels.shape[1] - border]


@pytest.mark.parametrize("border", [0, 4])
@pytest.mark.parametrize("colour", ["rgb", "y"])
def test_psnr_and_ssim_equal_scikit_image(colour: str, border: int) -> None:
    given = sample()
    image, target = (reference(each, colour, border) for each in (given.sr_image, given.hr_image))
    suffix = f":{border}" if border else ""
    assert load_metric(f"psnr_{colour}{suffix}").measure(given) == pytest.approx(
        peak_signal_noise_ratio(target, image, data_range=1.0), abs=1e-4
    )
    expected = structural_similarity(
        target,
        image,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        channel_axis=-1,
    )
    assert load_metric(f"ssim_{colour}{suffix}").measure(given) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("border", [0, 4])
@pytest.mark.parametrize("colour", ["rgb", "y"])
def test_psnr_and_ssim_equal_torchmetrics(colour: str, border: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    given = sample()
    image, target = (
        torch.from_numpy(reference(each, colour, border)).permute(2, 0, 1)[None]
        for each in (given.sr_image, given.hr_image)
    )
    psnr = functional.peak_signal_noise_ratio(image, target, data_range=1.0)
    # Its own mean takes in windows that reach over the mirrored border, which papers and scikit-image leave out.
    options = {"sigma": 1.5, "kernel_size": 11, "data_range": 1.0, "reduction": "none", "return_full_image": True}
    mirrored, positions = functional.structural_similarity_index_measure(image, target, **options)
    ssim = positions[..., 5:-5, 5:-5].mean()
    assert abs(mirrored.item() - ssim.item()) > 1e-3
    suffix = f":{border}" if border else ""
    assert load_metric(f"psnr_{colour}{suffix}").measure(given) == pytest.approx(psnr.item(), abs=1e-3)
    assert load_metric(f"ssim_{colour}{suffix}").measure(given) == pytest.approx(ssim.item(), abs=1e-4)


def test_the_protocols_differ_by_more_than_rounding_and_so_do_their_hashes() -> None:
    words = ["psnr_rgb", "psnr_rgb:4", "psnr_y", "psnr_y:4"]
    metrics = [load_metric(word) for word in words]
    values = sorted(metric.measure(sample()) for metric in metrics)
    assert min(b - a for a, b in pairwise(values)) > 0.3
    assert len({metric.protocol.hash for metric in metrics}) == 4


def test_small_errors_are_not_bent_by_the_cap() -> None:
    given = sample(noise=0.0)
    assert load_metric("psnr_rgb").measure(given) == 100.0
    nearly = given.sr_image.clone()
    nearly[0, 0, 0, 0] = (nearly[0, 0, 0, 0] * 255 + 1) / 255
    mean_square = 1 / 255**2 / nearly.numel()
    found = load_metric("psnr_rgb").measure(Sample("p", given.lr_image, nearly, given.hr_image))
    assert found == pytest.approx(-10 * np.log10(mean_square), abs=1e-3)


def test_consistency_is_the_reward_and_detail_that_of_the_benchmark() -> None:
    given = sample()
    reward = LRConsistency()(completions=given.sr_image, lr_image=given.lr_image)
    assert load_metric("lr_consistency").measure(given) == pytest.approx(reward[0])
    assert reward[0] == pytest.approx(
        image_psnr(downscale(given.sr_image, 4), given.lr_image, cap=60.0).item(), abs=1e-4
    )
    assert load_metric("gradient_energy").measure(given) == gradient_energy(given.sr_image).item()
    assert load_metric("gradient_energy").better == "neither"


def test_judges_score_as_they_do_elsewhere_and_name_question_and_weights() -> None:
    given = sample()
    for name, reward in (("refreward", RefReward()), ("heldout_judge", HeldOutJudge())):
        metric = load_metric(name)
        assert metric.measure(given) == pytest.approx(reward.score(given.lr_image[0], given.sr_image[0]), abs=1e-5)
        assert metric.protocol.judge == judge_identity(reward)
        assert "weights" in metric.protocol.judge and metric.kind == "reward"
        assert not metric.needs_hr
    assert RefReward().judge.spec.hash in load_metric("refreward").protocol.judge


def test_other_weights_are_another_protocol(tmp_path) -> None:
    judge = HeldOutJudge().judge
    with torch.no_grad():
        next(judge.parameters()).mul_(1.0001)
    judge.save_pretrained(tmp_path / "judge")
    default, changed = load_metric("heldout_judge"), load_metric(f"heldout_judge:{tmp_path / 'judge'}")
    (difference,) = default.protocol.differences(changed.protocol)
    assert difference.startswith("judge: weights")


def test_a_reward_of_ones_own_is_known_by_its_source(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "my_eval_rewards.py"
    source.write_text(
        "def half(*, completions, hr_image=None, **columns):\n"
        "    return [None if hr_image is None else 0.5 for _ in completions]\n"
    )
    metric = load_metric("my_eval_rewards.half")
    assert metric.measure(sample()) == 0.5
    given = sample()
    assert isnan(metric.measure(Sample("p", given.lr_image, given.sr_image)))
    before = metric.protocol.hash
    source.write_text(source.read_text().replace("0.5", "0.6"))
    assert load_metric("my_eval_rewards.half").protocol.hash != before


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("psnr", "several kinds of psnr"),
        ("ssim", "several kinds of ssim"),
        ("psnr_y:four", "number of pixels, got 'four'"),
        ("gradient_energy:2", "takes no argument"),
        ("psnr_z", "there is no such reward"),
        ("no_such_module.reward", "there is no module"),
    ],
)
def test_a_wrong_name_is_told(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_metric(word)


def test_the_least_side_is_what_can_be_measured() -> None:
    def measured(metric: Metric, side: int) -> float:
        image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        return metric.measure(Sample("p", image[..., ::4, ::4], image, image.flip(-1)))

    for word in ("psnr_y:4", "ssim_rgb", "ssim_y:4", "gradient_energy"):
        metric = load_metric(word)
        assert np.isfinite(measured(metric, metric.min_side))
    with pytest.raises((RuntimeError, DataError)):
        measured(load_metric("ssim_rgb"), load_metric("ssim_rgb").min_side - 1)
