"""FID, IS and KID against closed forms and torch-fidelity itself, and what an Inception of ours or theirs sees."""

import numpy as np
import pytest
import tiny
import torch
import torch_fidelity
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from dalleflamingo.evaluation import image_features, image_metrics
from dalleflamingo.evaluation.image_features import FeatureExtractor, InceptionOutput
from dalleflamingo.evaluation.similarities import Fidelity
from dalleflamingo.miniature.inception import MiniatureInception
from dalleflamingo.similarity import Pixels


def gaussian(n: int, mean: list[float], scale: list[float], seed: int = 0) -> torch.Tensor:
    """n points whose sample mean and sample covariance are exactly those of N(mean, diag(scale²))."""
    points = np.random.default_rng(seed).standard_normal((n, len(mean)))
    points -= points.mean(0)
    points = points @ np.linalg.inv(np.linalg.cholesky(np.cov(points, rowvar=False))).T
    return torch.from_numpy(points * scale + mean)


def test_fid_of_two_gaussians_is_the_closed_form():
    real, drawn = gaussian(50, [0, 0, 1], [1, 2, 3]), gaussian(60, [3, 0, 1], [2, 2, 1], seed=1)
    expected = 3**2 + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 1) ** 2  # ‖m − m'‖² + Σ (σ − σ')²
    assert image_metrics.fid(real, drawn) == pytest.approx(expected, rel=1e-6)
    assert image_metrics.fid(real, real) == pytest.approx(0, abs=1e-6)


def test_inception_score_of_certain_and_of_clueless_classifiers():
    certain = 100.0 * torch.eye(8).repeat(5, 1)
    assert image_metrics.inception_score(certain) == pytest.approx(8)  # sure of each, all classes equally often
    assert image_metrics.inception_score(certain[:1].repeat(40, 1)) == pytest.approx(1)
    assert image_metrics.inception_score(torch.zeros(40, 8)) == pytest.approx(1)


def test_kid_is_the_mean_of_the_unbiased_estimator_over_subsets():
    real, drawn = gaussian(8, [0, 0], [1, 1]), gaussian(8, [1, 0], [1, 1], seed=1)
    found = image_metrics.kid(real, drawn)

    def kernel(x, y):
        return (x @ y.T / 2 + 1) ** 3

    values, rng = [], np.random.RandomState(0)
    for _ in range(image_metrics.SUBSETS):
        x, y = (points[rng.choice(8, 4, replace=False)] for points in (real, drawn))
        within = sum((k.sum() - k.diagonal().sum()) / 12 for k in (kernel(x, x), kernel(y, y)))
        values.append(float(within - 2 * kernel(x, y).mean()))
    assert found.value == pytest.approx(np.mean(values)) and found.low < found.value < found.high
    far = image_metrics.kid(real, drawn + 3)
    assert far.value > found.value > image_metrics.kid(real, gaussian(8, [0, 0], [1, 1], seed=2)).value


@pytest.mark.parametrize("other", [torch.zeros(5, 3), torch.zeros(1, 2)], ids=["another Inception", "one picture"])
def test_sets_that_cannot_be_compared_are_refused(other):
    for metric in (image_metrics.fid, image_metrics.kid):
        with pytest.raises(ValueError, match=r"real pictures are \(5, 2\).*same Inception"):
            metric(torch.zeros(5, 2), other)


def test_few_pictures_carry_a_warning_and_intervals_hold_their_values():
    real = InceptionOutput(gaussian(80, [0, 0], [1, 1]), torch.zeros(80, 3))
    drawn = InceptionOutput(
        gaussian(60, [1, 0], [1, 1], seed=1), torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    )
    with pytest.warns(UserWarning, match="FID of 60 pictures is biased"):
        scores = image_metrics.evaluate(real, drawn, resamples=100)
    assert {name: score.higher_is_better for name, score in scores.items()} == {"FID": False, "IS": True, "KID": False}
    for score in scores.values():
        assert score.interval.low < score.interval.value < score.interval.high and score.interval.n == 60
    assert scores["IS"].interval.value == image_metrics.inception_score(drawn.logits)


class _Pictures(Dataset):
    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return torch.from_numpy(np.array(self.pictures[index])).permute(2, 0, 1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights for Inception-v3, in torch-fidelity's order."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        network = FeatureExtractorInceptionV3("x", ["2048"])
    file = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)
    return file


def test_figures_equal_torch_fidelitys_own_from_pictures_to_numbers(inception, tmp_path):
    real, drawn = tiny.pictures(6), tiny.pictures(12)[6:]
    weights = tmp_path / "weights.pth"
    torch.save(image_features._weights_of(inception), weights)
    stock = torch_fidelity.calculate_metrics(
        input1=_Pictures(drawn), input2=_Pictures(real), cuda=False, fid=True, isc=True, kid=True, verbose=False,
        isc_splits=1, samples_shuffle=False, kid_subset_size=3, kid_subsets=image_metrics.SUBSETS, rng_seed=0,
        feature_extractor_weights_path=str(weights), save_cpu_ram=True,
    )  # fmt: skip
    extractor = FeatureExtractor.inception_v3(inception)
    seen = extractor.look(real), extractor.look(drawn)
    assert seen[0].features.shape == (6, 2048) and extractor.name == "Inception-v3"
    scale = float(seen[0].features.var(0).sum())  # random weights make tiny features
    features = seen[0].features, seen[1].features
    assert image_metrics.fid(*features) == pytest.approx(stock["frechet_inception_distance"], abs=1e-3 * scale)
    assert image_metrics.inception_score(seen[1].logits) == pytest.approx(stock["inception_score_mean"], rel=1e-6)
    found = image_metrics.kid(*reversed(features)).value
    assert found == pytest.approx(stock["kernel_inception_distance_mean"], rel=1e-3, abs=1e-9)


def test_photographs_of_different_sizes_are_seen_as_if_each_were_alone(inception):
    extractor = FeatureExtractor.inception_v3(inception)
    sizes = [(64, 48), (64, 48), (50, 70), (64, 48)]
    photographs = [picture.resize(size) for picture, size in zip(tiny.pictures(4), sizes, strict=True)]
    together = extractor.look(photographs).features
    alone = torch.cat([extractor.look([photograph]).features for photograph in photographs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-3)
    assert len(together.unique(dim=0)) == 4


def test_weights_by_pickle_are_refused_and_missing_ones_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        FeatureExtractor.inception_v3(tmp_path / "evil.pth")
    with pytest.raises(FileNotFoundError, match="no .*gone.pth: download https"):
        FeatureExtractor.inception_v3(tmp_path / "gone.pth")


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    torch.manual_seed(0)
    MiniatureInception().save_pretrained(folder)
    return FeatureExtractor.miniature(folder)


def pictures(n: int) -> list[Image.Image]:
    return [picture.resize((64, 64)) for picture in tiny.pictures(n)]


def test_miniatures_features_do_not_depend_on_the_batch(miniature, monkeypatch):
    together = miniature.look(pictures(7))
    assert together.features.shape == (7, 64) and together.logits.shape == (7, 24 * 8)
    assert together.features.min() >= 0 and not together.features.requires_grad
    monkeypatch.setattr(image_features, "BATCH", 2)
    torch.testing.assert_close(miniature.look(pictures(7)).features, together.features, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="nothing|no picture"):
        miniature.look([])


def test_fidelity_is_the_negative_squared_distance_of_features(miniature):
    source, first, second = pictures(3)
    seen = miniature.look([source, first, second]).features
    found = Fidelity(miniature).compare([source, first], [[source, second], [second, first]])
    expected = [[0, -(seen[0] - seen[2]).square().sum()], [-(seen[1] - seen[2]).square().sum(), 0]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_pixels_are_compared_at_the_sources_size():
    white, black = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
    grey = Image.new("L", (32, 32), 51)  # a fifth of white
    found = Pixels().compare([white, black], [[white, black], [grey, black]])
    torch.testing.assert_close(found, torch.tensor([[0.0, -1.0], [-0.04, 0.0]]))
