"""Chapter 8, noise: sample i is a function of (seed, i)."""

from __future__ import annotations

import pytest
import torch

from laws import worst
from undiffuse.errors import UndiffuseError
from undiffuse.noise import Streams, slerp, stream
from undiffuse.schedules import VP


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 5), (3, 32, 32)])
def test_trap_X1_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    """Tiny tensors too: torch draws fewer than 16 numbers by another path."""
    together = Streams(5, 6)
    alone = [Streams(5, [i]) for i in range(6)]
    shuffled = Streams(5, [5, 3, 1, 0, 2, 4])
    for _ in range(4):  # the start and later draws
        all_six = together.draw(shape)
        assert torch.equal(all_six, torch.cat([one.draw(shape) for one in alone]))
        assert torch.equal(all_six[[5, 3, 1, 0, 2, 4]], shuffled.draw(shape))


def test_trap_X2_the_numbers_do_not_depend_on_device_or_type() -> None:
    x = torch.empty(2, 3, dtype=torch.float64)
    a = Streams(1, 2).draw((3,))
    assert a.dtype == torch.float32
    assert torch.equal(Streams(1, 2).draw((3,), x), a.double())
    assert torch.equal(Streams(1, 2).draw((3,), x.half()), a.half())
    assert stream(0, 0).device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_trap_X2_the_same_on_a_gpu() -> None:
    like = torch.empty(2, 3, device="cuda")
    assert torch.equal(Streams(1, 2).draw((3,), like).cpu(), Streams(1, 2).draw((3,)))


def test_streams_are_normal_and_independent() -> None:
    z = torch.cat([Streams(seed, 200).draw((50,)) for seed in range(4)]).double()
    assert abs(float(z.mean())) < 0.02
    assert abs(float(z.std()) - 1) < 0.02
    correlation = torch.corrcoef(z) - torch.eye(800)
    assert float(correlation.abs().max()) < 0.75  # 800 rows of 50 numbers
    assert abs(float(correlation.mean())) < 1e-3
    later = Streams(0, 200)
    later.draw((50,))
    assert abs(float((z[:200] * later.draw((50,))).mean())) < 0.05


def test_no_two_streams_of_a_seed_are_the_same() -> None:
    keys = {stream(seed, i).initial_seed() for seed in (0, 1, 2**40, 2**63 - 1) for i in range(20000)}
    assert len(keys) > 80000 - 5  # across seeds a collision of 32 bits may happen; within one it cannot
    assert len({stream(7, i).initial_seed() for i in range(50000)}) == 50000


def test_drawing_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state()
    Streams(3, 4).draw((5,))
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_seeds_and_batches_are_refused() -> None:
    for seed in (-1, 2**63, 1.0, True, "0"):
        with pytest.raises(UndiffuseError, match="seed"):
            stream(seed, 0)  # type: ignore[arg-type]
    for index in (-1, 2**32):
        with pytest.raises(UndiffuseError, match="sample number"):
            stream(0, index)
    with pytest.raises(UndiffuseError, match="batch of 3"):  # one row would broadcast to all
        Streams(0, 1)(torch.zeros(3, 2), VP()(0.5), VP()(0.4))


def test_G7_slerp_keeps_the_deviation_that_lerp_loses() -> None:
    a, b = Streams(0, 64).draw((3, 16, 16)).double(), Streams(1, 64).draw((3, 16, 16)).double()
    assert torch.equal(slerp(a, b, 0.0), a)
    assert worst(slerp(a, b, 1.0), b) < 1e-12
    assert float(((a + b) / 2).std()) == pytest.approx(0.707, abs=0.02)
    for weight in (0.25, 0.5, 0.75):
        middle = slerp(a, b, weight)
        assert float(middle.std()) == pytest.approx(1.0, abs=0.03)
        assert worst(middle, slerp(b, a, 1 - weight)) < 1e-12
    assert worst(slerp(a, a, 0.3), a) < 1e-12
    assert slerp(a.half(), b.half(), 0.5).dtype == torch.float16
