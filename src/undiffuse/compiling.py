"""Compiling: a network as one program for each shape of its input, by ``torch.compile``.

It computes what the network does, to rounding, with fewer passes over memory; on a GPU a whole call is then one launch
(CUDA graphs). Training compiles the network that learns (:func:`Compiled`), whose batches are all alike. A sampler asks
for any number of rows, so there calls are filled up (:class:`Filled`) and a few programs serve all of them.

Where compiling does not work, the network computes as it is, and a warning says why.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .errors import UndiffuseWarning
from .reuse import Kept

SHAPES = 4
"""Shapes of input for which a function is compiled; in training there are two at most where all batches are alike."""
FILLED_SHAPES = 8
"""The same in sampling; of more than eight for one network torch compiles none."""
MOST_FILLED = 2 ** (FILLED_SHAPES - 1)
"""Rows up to which each power of two has its program."""

Backend = str | Callable[..., Any]
"""What makes the programs, as ``torch.compile`` takes it."""


@final
class Program:
    """A function of tensors through ``torch.compile``: one program for each shape of what it is given, ``most`` of them
    at most; other shapes go through the function as it is. So does everything where compiling does not work.

    Args:
        otherwise: what goes on without, for the warning.
        mode: of torch's own backend, such as ``reduce-overhead``.

    Attributes:
        works: whether nothing is known against it.
        seconds: that the first call of each shape has taken: the time of compiling.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        otherwise: str,
        most: int = SHAPES,
        backend: Backend = "inductor",
        mode: str | None = None,
    ) -> None:
        self.function = function
        self.otherwise = otherwise
        self.most = most
        self.program = torch.compile(function, dynamic=False, backend=backend, mode=mode)
        self.shapes: set[tuple[object, ...]] = set()
        self.works = True
        self.seconds = 0.0

    def __call__(self, *given: Tensor | None, **named: Tensor | None) -> Any:
        values = (*((str(i), value) for i, value in enumerate(given)), *named.items())
        shape = tuple((name, value if value is None else tuple(value.shape)) for name, value in values)
        known = shape in self.shapes
        if not self.works or not (known or len(self.shapes) < self.most):
            return self.function(*given, **named)
        if known:
            return self.program(*given, **named)
        begun = time.monotonic()
        try:
            made = self.program(*given, **named)
        except Exception as error:  # of any kind: no compiler, an operation that it does not know, no disk ...
            made = self.function(*given, **named)  # raises itself, if that is not it
            self.works = False
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0].replace('(', '').replace(')', '')[:160]}"
            warnings.warn(f"torch.compile does not work here ({reason}); {self.otherwise}", UndiffuseWarning, 2)
        self.shapes.add(shape)
        self.seconds += time.monotonic() - begun
        return made


@final
class Filled:
    """A :class:`Program` for samplers, of a function whose arguments and results (a tensor, or several) all have the
    batch first.

    Calls are filled up to a power of two with copies of the first row, so that a few programs serve any number of rows;
    how many it is depends on the call alone, and so does the rounding. Where gradients are asked for, the function
    computes as it is.

    A CUDA graph writes each answer where the last one stood, and solvers keep past answers: what is returned is a copy.
    """

    def __init__(self, function: Callable[..., Any], backend: Backend, mode: str | None) -> None:
        self.program = Program(function, "sampling goes on without", FILLED_SHAPES, backend, mode)

    def __call__(self, x: Tensor, *given: Tensor | None, **named: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            return self.program.function(x, *given, **named)
        count = len(x)
        more = (1 << (count - 1).bit_length()) - count

        def filled(values: Tensor | None) -> Tensor | None:
            if values is None or not more:
                return values
            return torch.cat([values, values[:1].expand(more, *values.shape[1:])])

        made = self.program(filled(x), *map(filled, given), **{name: filled(values) for name, values in named.items()})
        return tuple(each[:count].clone() for each in made) if isinstance(made, tuple) else made[:count].clone()


@final
class Compiled(nn.Module):
    """A network that computes through a program, with the weights of the network itself.

    Args:
        program: of the network's own call.
        remembering: of ``(x, label, features or None) -> (y, features)``, calls that keep or reuse what lies deep
            (:mod:`.reuse`).
    """

    def __init__(self, network: nn.Module, program: Program | Filled, remembering: Filled | None = None) -> None:
        super().__init__()
        self.network = network
        self.program = program
        self.remembering = remembering

    def forward(self, x: Tensor, label: Tensor, deep: Kept | None = None, **encoded: Tensor) -> Tensor:
        """See :meth:`.Network.forward`."""
        if deep is None:
            return self.program(x, label, **encoded)
        assert self.remembering is not None
        y, deep.features = self.remembering(x, label, deep.features, **encoded)
        return y


def around(denoiser: Denoiser, network: nn.Module) -> Denoiser:
    """The same conditions and meaning around another network; what looks at the weights uses the ``denoiser``."""
    parts = (denoiser.schedule, denoiser.prediction, denoiser.label, denoiser.input_scale, denoiser.conditions)
    with warnings.catch_warnings():  # the denoiser itself has said what there is to say of its schedule
        warnings.simplefilter("ignore", UndiffuseWarning)
        return Denoiser(network, *parts, denoiser.learned_variance)


def for_training(denoiser: Denoiser) -> Denoiser:
    """The denoiser with its network compiled, forwards and backwards."""
    without = "training goes on without, but a run that began with it not bit by bit"
    return around(denoiser, Compiled(denoiser.network, Program(denoiser.network.forward, without)))


@final
class ForSampling:
    """What samplers ask in place of a denoiser and its codec's decoder: the same, compiled. On a GPU, with torch's own
    backend, each program is a CUDA graph.

    Attributes:
        denoiser: the same around the compiled network.
        decode: the compiled decoder, if there is one.
    """

    def __init__(self, denoiser: Denoiser, decode: Callable[[Tensor], Tensor] | None, backend: Backend) -> None:
        self.backend = backend
        network = denoiser.network
        graphs = backend == "inductor" and next(network.parameters()).is_cuda
        mode = "reduce-overhead" if graphs else None

        def remembering(x: Tensor, label: Tensor, features: Tensor | None, **encoded: Tensor) -> Any:
            kept = Kept(features)
            return network(x, label, **encoded, deep=kept), kept.features

        call, again = Filled(network.forward, backend, mode), Filled(remembering, backend, mode)
        self.denoiser = around(denoiser, Compiled(network, call, again))
        self.decode = None if decode is None else Filled(decode, backend, mode)
        self._programs = [each.program for each in (call, again, self.decode) if each is not None]

    @property
    def works(self) -> bool:
        """Whether compiling has not failed so far."""
        return all(program.works for program in self._programs)

    @property
    def seconds(self) -> float:
        """That compiling has taken so far, the first call of each shape included."""
        return sum(program.seconds for program in self._programs)
