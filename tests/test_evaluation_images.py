"""FID and IS against closed forms and torch-fidelity itself, and the features of an Inception of ours or theirs."""

import numpy as np
import pytest
import tiny
import torch
import torch_fidelity
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_isc import isc_features_to_metric

from dalleflamingo import registry
from dalleflamingo.evaluation import image_metrics
from dalleflamingo.evaluation.image_features import URL_INCEPTION_V3, FeatureExtractor, InceptionV3
from dalleflamingo.evaluation.similarities import Fidelity
from dalleflamingo.miniature.inception import MiniatureInception
from dalleflamingo.sources import models


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


def test_an_inception_score_of_splits_is_torch_fidelitys_published_default():
    logits = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) * 4
    assert image_metrics.inception_score(logits, splits=10) == isc_features_to_metric(logits)["inception_score_mean"]
    certain = 100.0 * torch.eye(8).repeat(5, 1)
    assert image_metrics.inception_score(certain, splits=40) == pytest.approx(1)  # an image alone differs from none
    assert image_metrics.inception_score(certain, splits=20) <= 2 + 1e-9
    with pytest.raises(ValueError, match="40 images in 41 splits: give at least one image a split"):
        image_metrics.inception_score(certain, splits=41)


@pytest.mark.parametrize("other", [torch.zeros(5, 3), torch.zeros(1, 2)], ids=["another Inception", "one picture"])
def test_sets_that_cannot_be_compared_are_refused(other):
    with pytest.raises(ValueError, match=r"real images are \(5, 2\).*same Inception"):
        image_metrics.fid(torch.zeros(5, 2), other)


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
    real, drawn = tiny.pictures(3), tiny.pictures(6)[3:]
    weights = tmp_path / "weights.pth"
    torch.save(load_file(inception), weights)
    stock = torch_fidelity.calculate_metrics(
        input1=_Pictures(drawn),
        input2=_Pictures(real),
        cuda=False,
        fid=True,
        isc=True,
        verbose=False,
        isc_splits=1,
        samples_shuffle=False,
        rng_seed=0,
        feature_extractor_weights_path=str(weights),
        save_cpu_ram=True,
    )
    extractor = FeatureExtractor(InceptionV3.from_pretrained(weights))
    seen = extractor.extract(real), extractor.extract(drawn)
    assert seen[0].features.shape == (3, 2048) and extractor.name == "Inception-v3"
    scale = float(seen[0].features.var(0).sum())  # random weights make tiny features
    features = seen[0].features, seen[1].features
    assert image_metrics.fid(*features) == pytest.approx(stock["frechet_inception_distance"], abs=1e-3 * scale)
    assert image_metrics.inception_score(seen[1].logits) == pytest.approx(stock["inception_score_mean"], rel=1e-6)


def test_photographs_of_different_sizes_are_seen_as_if_each_were_alone(inception):
    extractor = FeatureExtractor(InceptionV3.from_pretrained(inception))
    sizes = [(64, 48), (50, 70), (64, 48)]
    photographs = [picture.resize(size) for picture, size in zip(tiny.pictures(3), sizes, strict=True)]
    together = extractor.extract(photographs).features
    alone = torch.cat([extractor.extract([photograph]).features for photograph in photographs])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-3)
    assert len(together.unique(dim=0)) == 3


def test_weights_by_pickle_are_refused_and_missing_ones_named(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("unpickled",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        InceptionV3.from_pretrained(tmp_path / "evil.pth")
    with pytest.raises(FileNotFoundError, match="no .*gone.pth: download https"):
        InceptionV3.from_pretrained(tmp_path / "gone.pth")


@pytest.mark.parametrize("url", [URL_INCEPTION_V3, "https://elsewhere.org/other.pth"])
def test_weights_whose_server_does_not_answer_are_named_at_once(tmp_path, monkeypatch, url):
    asked = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(registry, "answers", lambda url: asked.append(url))
    file = tmp_path / "checkpoints" / url.rpartition("/")[2]
    with pytest.raises(registry.RegistryError, match=f"{file} is not on this machine, .*copy the file from a machine"):
        InceptionV3.from_pretrained(url)
    assert asked == [url]
    file.parent.mkdir()
    file.touch()  # cached: torch opens it, and nobody is asked
    with pytest.raises((EOFError, RuntimeError)):
        InceptionV3.from_pretrained(url)
    assert asked == [url]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature")
    torch.manual_seed(0)
    MiniatureInception().save_pretrained(folder)
    return FeatureExtractor(MiniatureInception.from_pretrained(folder))


def pictures(n: int) -> list[Image.Image]:
    return [picture.resize((64, 64)) for picture in tiny.pictures(n)]


def test_an_inception_of_the_registry_is_opened_by_its_own_class():
    assert models.class_of("miniature/inception") is MiniatureInception
    assert models.class_of("inception-v3") in (InceptionV3, None)
    extractor = FeatureExtractor.from_registry("miniature/inception")
    assert type(extractor.model) is MiniatureInception and not extractor.model.training
    assert extractor.name == "the miniature's Inception"
    with pytest.raises(registry.RegistryError, match="no 'miniature/inceptions'"):
        FeatureExtractor.from_registry("miniature/inceptions")


def test_miniatures_features_do_not_depend_on_the_batch(miniature):
    together = miniature.extract(pictures(7))
    assert together.features.shape == (7, 64) and together.logits.shape == (7, 24 * 8)
    assert together.features.min() >= 0 and not together.features.requires_grad
    apart = miniature.extract(pictures(7), batch_size=2).features
    torch.testing.assert_close(apart, together.features, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no image"):
        miniature.extract([])
    with pytest.raises(ValueError, match="32 × 32 pixels"):
        miniature.extract([Image.new("RGB", (32, 32))])


def test_fidelity_is_the_negative_squared_distance_of_features(miniature):
    source, first, second = pictures(3)
    seen = miniature.extract([source, first, second]).features
    found = Fidelity(miniature).compare([source, first], [[source, second], [second, first]])
    expected = [[0, -(seen[0] - seen[2]).square().sum()], [-(seen[1] - seen[2]).square().sum(), 0]]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_the_fingerprint_of_fidelity_changes_with_the_weights(miniature):
    torch.manual_seed(0)
    same, other = MiniatureInception(), MiniatureInception()
    fingerprints = [Fidelity(FeatureExtractor(model)).fingerprint() for model in (miniature.model, same, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
