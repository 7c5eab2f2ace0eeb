"""The Inception of the FID against the same network written in another way, on random weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from undiffuse import UndiffuseError, frechet, from_array
from undiffuse.evaluation import inception
from undiffuse.evaluation.extraction import FEATURES, extract
from undiffuse.evaluation.features import weights_digest
from undiffuse.evaluation.inception import Inception, InceptionFID, download_inception, load_inception
from undiffuse.evaluation.torchfile import read_torch_file

SIZE = 107  # the least that leaves a few positions in the last block; the graph takes any


def random_weights(classes: int = 1008) -> dict[str, Tensor]:
    """Weights of a size at which no layer dies out, and batch norms that do something."""
    source, found = torch.Generator().manual_seed(0), {}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in InceptionFID().state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue  # the published file is older than these
        value = torch.randn(shape, generator=source)
        if name.endswith("conv.weight"):
            value = value * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            value = 0.7 + value.abs() / 2
        elif name.endswith(("bias", "running_mean")):
            value = value / 10
        else:
            value = value / 45
        found[name] = value[:classes] if name.startswith("fc.") else value
    return found


WEIGHTS = random_weights()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(WEIGHTS, path)
    return path


def by_hand(x: Tensor) -> dict[int, Tensor]:
    """The graph as TensorFlow lists its operations, from names of tensors; pools and norms written out."""
    w = {name: value.double() for name, value in WEIGHTS.items()}

    def unit(name: str, x: Tensor, stride: int = 1, valid: bool = False) -> Tensor:
        kernel = w[f"{name}.conv.weight"]
        padding = (0, 0) if valid else (kernel.shape[2] // 2, kernel.shape[3] // 2)
        x = F.conv2d(x, kernel, stride=stride, padding=padding)
        mean, var, scale, bias = (
            w[f"{name}.bn.{part}"].reshape(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.relu((x - mean) * scale / torch.sqrt(var + 1e-3) + bias)

    def mean3(x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)
        total = F.conv2d(x, ones, padding=1, groups=x.shape[1])
        return total / F.conv2d(torch.ones_like(x), ones, padding=1, groups=x.shape[1])

    def max3(x: Tensor, stride: int, padding: int) -> Tensor:
        x = F.pad(x, (padding,) * 4, value=-torch.inf)
        return x.unfold(2, 3, stride).unfold(3, 3, stride).amax((-1, -2))

    def chain(block: str, x: Tensor, *names: str, stride: int = 1) -> Tensor:
        for name in names:
            last = name == names[-1]
            x = unit(f"{block}.{name}", x, stride if last else 1, valid=last and stride == 2)
        return x

    found: dict[int, Tensor] = {}
    x = unit("Conv2d_1a_3x3", x, 2, True)
    x = unit("Conv2d_2b_3x3", unit("Conv2d_2a_3x3", x, 1, True))
    x = max3(x, 2, 0)
    found[64] = x.mean((2, 3))
    x = max3(unit("Conv2d_4a_3x3", unit("Conv2d_3b_1x1", x), 1, True), 2, 0)
    found[192] = x.mean((2, 3))
    double = [f"branch3x3dbl_{i}" for i in (1, 2, 3)]
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        one, five = chain(block, x, "branch1x1"), chain(block, x, "branch5x5_1", "branch5x5_2")
        x = torch.cat([one, five, chain(block, x, *double), chain(block, mean3(x), "branch_pool")], 1)
    a = chain("Mixed_6a", x, "branch3x3", stride=2)
    x = torch.cat([a, chain("Mixed_6a", x, *double, stride=2), max3(x, 2, 0)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven = chain(block, x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
        long = chain(block, x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
        x = torch.cat([chain(block, x, "branch1x1"), seven, long, chain(block, mean3(x), "branch_pool")], 1)
    found[768] = x.mean((2, 3))
    a = chain("Mixed_7a", x, "branch3x3_1", "branch3x3_2", stride=2)
    b = chain("Mixed_7a", x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)), stride=2)
    x = torch.cat([a, b, max3(x, 2, 0)], 1)
    for block in ("Mixed_7b", "Mixed_7c"):
        pooled = mean3(x) if block == "Mixed_7b" else max3(x, 1, 1)
        three, twice = chain(block, x, "branch3x3_1"), chain(block, x, *double[:2])
        parts = [chain(block, x, "branch1x1")]
        parts += [chain(block, three, f"branch3x3_2{side}") for side in "ab"]
        parts += [chain(block, twice, f"branch3x3dbl_3{side}") for side in "ab"]
        x = torch.cat([*parts, chain(block, pooled, "branch_pool")], 1)
    found[2048] = x.mean((2, 3))
    found[1008] = found[2048] @ w["fc.weight"].T
    return found


@torch.inference_mode()
def test_trap_V1_the_graph_is_that_of_the_fid(file: Path) -> None:
    x = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    expected = by_hand(x)
    assert {dim: value.shape[1] for dim, value in expected.items()} == {d: d for d in (64, 192, 768, 2048, 1008)}
    for dim in (64, 192, 768, 2048):
        network = load_inception(file, dim).double().eval()
        features, logits = network(x)
        spread = float(expected[dim].std())
        assert 1e-3 < spread < 1e3
        assert float((features - expected[dim]).abs().max()) < 1e-9 * spread
        assert (logits is not None) == (dim == 2048)
    assert torch.allclose(logits, expected[1008], atol=1e-9)


def test_the_network_has_as_many_parameters_as_was_published() -> None:
    """23,834,568 with 1,000 classes (torchvision without its second head; Keras counts 23,851,784, with 17,216 running
    means and as many variances, and without 17,216 scales), and 8 classes of 2,049 more."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in InceptionFID().parameters())
    assert count == 23_834_568 + 8 * 2049 == 23_851_784 - 17_216 + 8 * 2049


def test_trap_V1_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({**WEIGHTS, "fc.weight": WEIGHTS["fc.weight"][:1000].clone()}, path)
    with pytest.raises(UndiffuseError, match=r"1,000 classes: these are not the weights of the FID.*torchvision"):
        load_inception(path)
    save_file({"fc.weight": WEIGHTS["fc.weight"]}, path)
    with pytest.raises(UndiffuseError, match="weights of another architecture"):
        load_inception(path)


def test_the_weights_are_never_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = from_array(np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr(inception, "urlopen", never)
    with pytest.raises(UndiffuseError, match=r"inception needs its weights \(95 MB\): name the file .*, or allow"):
        FEATURES["inception"].fit(data)
    with pytest.raises(UndiffuseError, match="no such file; get https://"):
        Inception(weights=str(tmp_path / "nothing.safetensors")).fit(data)


def test_a_download_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = tmp_path / "published.pth"
    torch.save(WEIGHTS, published, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(inception, "ADDRESS", published.as_uri())
    with pytest.raises(UndiffuseError, match=r"gave other bytes \(sha256 .*6726825d\.\.\. was expected"):
        download_inception(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(inception, "BEGINS", hashlib.sha256(published.read_bytes()).hexdigest()[:8])
    path = download_inception(tmp_path / "cache")
    published.unlink()
    assert download_inception(tmp_path / "cache") == path
    assert weights_digest(load_inception(path)) == weights_digest(load_inception(path, 64))
    monkeypatch.setattr(inception, "ADDRESS", published.as_uri())
    with pytest.raises(UndiffuseError, match="cannot be reached"):
        download_inception(tmp_path / "other")


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read_as_torch_reads_them(tmp_path: Path, zipped: bool) -> None:
    grid = torch.arange(24.0).reshape(4, 6)
    tensors = {"whole": grid, "part": grid[1:, ::2], "turned": grid.T, "count": torch.tensor(7), "half": grid.half()}
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for number, content in enumerate((tensors, module.state_dict())):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        found = read_torch_file(path)
        assert list(found) == list(content)
        assert all(torch.equal(found[name], content[name]) for name in content)
        assert all(found[name].dtype == content[name].dtype for name in content)


@pytest.mark.parametrize("zipped", [True, False])
def test_LD2_nothing_in_a_torch_file_is_run(tmp_path: Path, zipped: bool) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "run"),)

    for number, content in enumerate(({"a": Bomb()}, Bomb(), {"a": 3}, [torch.ones(2)])):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UndiffuseError, match="not a file of plain tensors"):
            read_torch_file(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_LD2_damaged_torch_files_are_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.arange(100.0)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    random = np.random.Generator(np.random.PCG64(0))
    for end in random.integers(0, len(content) - 8, 40):
        path.write_bytes(content[:end])
        with pytest.raises(UndiffuseError, match=r"weights\.pth: not a file of plain tensors"):
            read_torch_file(path)
    for place in random.integers(0, len(content), 200):
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        with contextlib.suppress(UndiffuseError):  # refused in one line, or it was in the numbers
            read_torch_file(path)


def test_trap_V2_the_two_inceptions_are_two_metrics(file: Path) -> None:
    values = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (1, 32, 32), dtype=np.uint8)
    values[0, 0, :2] = 0, 255
    data = from_array(np.repeat(values, 2, 0))
    made = [Inception(resize, 64, str(file)).fit(data) for resize in ("tf1-bilinear", "pil-bicubic")]
    found = [extract(features, values).features for features in made]
    assert [features.name.split("/")[1] for features in made] == ["tf1-bilinear", "pil-bicubic"]
    assert made[0].weights == made[1].weights
    assert made[0].fingerprint != made[1].fingerprint
    assert not torch.allclose(found[0], found[1], rtol=1e-3)
    with pytest.raises(UndiffuseError, match="inception features come in 64, 192, 768, 2048, got 100"):
        Inception(dim=100, weights=str(file)).fit(data)


THEIRS = """
import sys, types
import numpy as np
import torch

# torch-fidelity imports torchvision for data sets that are not used here; an empty one keeps the real one away.
for name in ("", ".datasets", ".transforms", ".transforms.functional", ".models", ".ops"):
    sys.modules["torchvision" + name] = types.ModuleType("torchvision" + name)
for name in ("datasets", "transforms", "models", "ops"):
    setattr(sys.modules["torchvision"], name, sys.modules["torchvision." + name])
sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]
for name in ("CIFAR10", "CIFAR100", "STL10"):
    setattr(sys.modules["torchvision.datasets"], name, object)

from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

weights, pictures, out = sys.argv[1:]
def features(name, x):
    network = FeatureExtractorInceptionV3("inception", [name], feature_extractor_weights_path=weights)
    with torch.no_grad():
        return torch.cat([network(part)[0] for part in x.split(8)])

x = torch.from_numpy(np.load(pictures))
low, high = features("64", x), features("2048", x[:8])
half = len(x) // 2
statistics = [fid_features_to_statistics(part) for part in (low[:half], low[half:])]
found = fid_statistics_to_metric(*statistics, False)
np.savez(out, low=low, high=high, frechet=float(next(iter(found.values()))))
"""


@pytest.mark.slow
def test_features_and_frechet_distance_are_those_of_torch_fidelity(tmp_path: Path) -> None:
    """Fetched into a folder of its own, without what it depends on: torchvision must not come near this torch."""
    wanted = ["torch-fidelity==0.4.0", "--no-deps", "--target", str(tmp_path / "site")]
    fetched = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip("torch-fidelity cannot be fetched here")
    tensors = random_weights()
    torch.save(tensors, tmp_path / "weights.pth")
    source = np.random.Generator(np.random.PCG64(0))
    coarse = source.integers(0, 256, (160, 3, 13, 13), dtype=np.uint8)
    pictures = coarse.repeat(23, axis=2).repeat(23, axis=3)  # 299 x 299: nobody resizes
    pictures[80:] = pictures[80:] // 2 + 40
    np.save(tmp_path / "pictures.npy", pictures)
    files = [str(tmp_path / name) for name in ("weights.pth", "pictures.npy", "theirs.npz")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", THEIRS, *files], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = np.load(tmp_path / "theirs.npz")
    x = (torch.from_numpy(pictures).float() - 128) / 128
    ours: dict[int, Tensor] = {}
    for dim in (64, 2048):
        network = InceptionFID(dim).eval()
        network.load_state_dict({**network.state_dict(), **tensors})
        with torch.no_grad():
            ours[dim] = torch.cat([network(part)[0] for part in (x if dim == 64 else x[:8]).split(8)])
    for dim, name in ((64, "low"), (2048, "high")):
        scale = float(ours[dim].std())
        np.testing.assert_allclose(ours[dim].numpy(), theirs[name], atol=1e-4 * scale, rtol=1e-4)
    mine = frechet(ours[64][:80], ours[64][80:]).value
    assert mine == pytest.approx(float(theirs["frechet"]), rel=1e-4)
