"""Learning a codec: what the decoder makes of the latents should be the data.

    L = |x - y| + kl KL(q(z|x) || N(0, 1)) + perceptual |f(x) - f(y)|^2 - adversarial lambda D(y)

with y decoded from a sample of the posterior q (Rombach et al. 2022, arXiv:2112.10752, appendix G). All terms are means
over the elements of the data. With a codebook y is decoded from the nearest vectors, and instead of the divergence
vectors and latents are drawn to each other (van den Oord et al. 2017, eq. 3).

The discriminator D looks at patches and learns with the hinge loss in the same update, from the same backward pass:
the codec sees it with its weights held, and it sees what the codec made as given. ``lambda`` makes its gradient at the
last layer as long as that of the other terms (Esser et al. 2021, arXiv:2012.09841, eq. 7).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs import FILE, build_codec, codec_cost, codec_meaning, measure
from ..data import Dataset
from ..distributed import Team
from ..errors import UndiffuseError
from ..networks.autoencoder import Autoencoder, PositionNorm, straight_through
from ..networks.layers import convolution
from ..outputs import tile, write_png
from .draws import epoch_order, generator
from .held_out import SEED, Curve, Evaluation, draws, evaluating, finite
from .perceptual import distance_of
from .recipe import share
from .tasks import Drawn, Task
from .trainer import Trainer

MEASURED = 10_000
"""Items on which mean and deviation of the latents are measured, at the end of a run; a tenth of them on the way."""
PREVIEWS = 8
"""Data a row of a preview."""
LATEST = 0.9
"""No vector of the codebook is moved after this share of the run: it would not be learned any more."""


class Critic(nn.Module):
    """How real each patch looks, ``[B, C, *spatial] -> [B, 1, *]``: convolutions with stride 2 (Isola et al. 2017)."""

    def __init__(self, channels: int, rank: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [convolution(rank, inputs, outputs, 3, stride=2), PositionNorm(outputs), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, convolution(rank, 4 * width, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@final
class Learner(nn.Module):
    """The weights of a run: the codec, and what only training needs.

    Attributes:
        used: ``[codebook]``, how often each vector was the nearest since the last revival.
        counts: how often each was in each part of this update, which may yet turn out not to be finite; not kept.
        latest: latents of the last part of a batch, where there is a codebook; not kept.
    """

    def __init__(self, codec: Autoencoder, critic: Critic | None) -> None:
        super().__init__()
        self.codec = codec
        self.critic = critic
        self.counts: list[Tensor] = []
        self.latest: Tensor | None = None
        if codec.codebook is not None:
            self.register_buffer("used", torch.zeros(len(codec.codebook)))


def learner_of(trainer: Trainer) -> Learner:
    """What a trainer with this task trains."""
    return cast(Learner, trainer.denoiser)


@final
class Autoencoding(Task):
    """An autoencoder for data of one shape."""

    def __init__(self, dataset: Dataset, recipe: Any) -> None:
        super().__init__(dataset, recipe)
        if dataset.codec is not None:
            raise UndiffuseError("a codec of latents: train it on the data, without --codec")
        assert recipe.codec is not None
        self.choice = recipe.codec
        self.config = self.choice.config(recipe.model, dataset.spec)
        self.features: Callable[[Tensor, Tensor], Tensor] | None = None
        self.perceives = ""
        if self.choice.perceptual:
            self.features, self.perceives = distance_of(self.choice.features, dataset)

    def build(self) -> Learner:
        codec = build_codec("autoencoder", self.config)
        assert isinstance(codec, Autoencoder)
        codec.latent_shape(self.dataset.spec.shape)
        return Learner(codec, Critic(codec.channels, codec.rank) if self.choice.adversarial else None)

    def trunk(self, module: Any) -> nn.Module:
        return module.codec

    # --- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, module: Any, *values: Any, **options: Any) -> Tensor:
        learner: Learner = module
        x, eps = values
        y, extra = self.made(learner, x, eps)
        each = self.apart(x, y) + extra
        if learner.critic is None:
            return each
        if options["judged"]:
            return each + self.choice.adversarial * self.judged(learner.critic, x, y, each, learner.codec.last)
        # Not yet: gradients that are 0, so that the optimiser's state is whole from the first update on.
        return each + 0 * torch.stack([parameter.sum() for parameter in learner.critic.parameters()]).sum()

    def made(self, learner: Learner, x: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the codec makes of ``x`` (without ``eps``, of the posterior's mean), and its latents' cost, ``[B]``."""
        codec, size = learner.codec, x[0].numel()
        mean, std = codec.posterior(x)
        mean = mean.float()
        if codec.codebook is None:
            assert std is not None
            std = std.float()
            y = codec.draw(mean if eps is None else mean + std * eps)
            divergence = (mean.square() + std.square() - 1).flatten(1).sum(1) / 2 - std.log().flatten(1).sum(1)
            return y.float(), self.choice.kl * divergence / size
        numbers = codec.nearest(mean)
        vectors = codec.look_up(numbers)
        if learner.training:
            learner.counts.append(torch.bincount(numbers.flatten(), minlength=len(learner.used)))
            learner.latest = mean.detach()
        y = codec.draw(straight_through(mean, vectors))
        drawn = (mean.detach() - vectors).square() + self.choice.commitment * (mean - vectors.detach()).square()
        return y.float(), drawn.flatten(1).mean(1)

    def apart(self, x: Tensor, y: Tensor) -> Tensor:
        """How unlike the data ``y`` is, ``[B]``."""
        each = (x - y).abs() if self.choice.distance == "l1" else (x - y).square()
        found = each.flatten(1).mean(1)
        return found if self.features is None else found + self.choice.perceptual * self.features(x, y)

    @staticmethod
    def judged(critic: Critic, x: Tensor, y: Tensor, each: Tensor, last: Tensor) -> Tensor:
        """The codec's loss of not deceiving, weighed, and the critic's own hinge loss, ``[B]``."""
        held = {name: parameter.detach() for name, parameter in critic.named_parameters()}
        fooled = -torch.func.functional_call(critic, held, (y,)).flatten(1).mean(1)
        lengths = [torch.autograd.grad(loss.sum(), last, retain_graph=True)[0].norm() for loss in (each, fooled)]
        weight = (lengths[0] / (lengths[1] + 1e-4)).clamp(0, 1e4).detach()
        own = F.relu(1 - critic(x)).flatten(1).mean(1) + F.relu(1 + critic(y.detach())).flatten(1).mean(1)
        return weight * fooled + own / 2

    # --- what the trainer asks ----------------------------------------------------------------------------------------

    def drawn(self, trainer: Trainer, given: dict[str, Tensor], step: int, team: Team) -> Drawn:
        size = self.recipe.training.batch_size
        if self.choice.codebook and team.size > 1:
            raise UndiffuseError("a codebook is learned by one process: start one, or say codec.codebook=0")
        learner = learner_of(trainer)
        learner.counts.clear()
        source = generator(trainer.seed, "posterior", step, trainer.device)
        shape = learner.codec.latent_shape(self.dataset.spec.shape)
        eps = torch.randn(size, *shape, generator=source, device=trainer.device)
        judged = bool(self.choice.adversarial) and self._progress(trainer, step) >= self.choice.adversarial_from
        return Drawn((eps[share(size, team.rank, team.size)],), options={"judged": judged})

    def written(self, drawn: Drawn) -> dict[str, Tensor]:
        return {"eps": drawn.values[0], "judged": torch.tensor(drawn.options["judged"])}

    def read(self, tensors: Mapping[str, Tensor]) -> Drawn:
        return Drawn((tensors["eps"],), options={"judged": bool(tensors["judged"])})

    @staticmethod
    def _progress(trainer: Trainer, step: int) -> float:
        """The share of the run that is over after ``step`` updates; 0 while its length is not known."""
        images = step * trainer.recipe.training.batch_size
        return 0.0 if trainer.plan.images is None else images / trainer.plan.images

    @torch.no_grad()
    def after(self, trainer: Trainer) -> None:
        """Every so often, vectors of the codebook that no latent was near to take the place of latents that are far
        from all vectors (Zeghidour et al. 2021 draw them at random; here nothing is drawn)."""
        learner = learner_of(trainer)
        for count in learner.counts:
            learner.used += count
        book, every = learner.codec.codebook, self.choice.revive
        if book is None or not every or trainer.step % every or learner.latest is None:
            return
        dead = (learner.used == 0).nonzero().flatten()
        learner.used.zero_()
        if not len(dead) or self._progress(trainer, trainer.step) > LATEST:
            return
        latents = learner.latest.movedim(1, -1).flatten(0, -2)
        vectors = learner.codec.look_up(learner.codec.nearest(learner.latest)).movedim(1, -1).flatten(0, -2)
        far = (latents - vectors).square().sum(1)
        chosen = far.topk(min(len(dead), len(far))).indices
        book[dead[: len(chosen)]] = latents[chosen].to(book)
        for moment in trainer.optimiser.state[book].values():
            if moment.shape == book.shape:
                moment[dead] = 0

    def product(self, trainer: Trainer, module: Any, info: Mapping[str, Any]) -> Trained:
        return Trained(self, module, info, MEASURED if trainer.finished else MEASURED // 10)

    def exported(self, folder: Path) -> int:
        return int(codec_meaning(folder / FILE)["info"]["step"])

    def judge(self, held_out: Dataset, device: torch.device) -> Reconstructions:
        return Reconstructions(self, held_out, device)

    def preview(self, trainer: Trainer, whole: Dataset, folder: Path, run: str) -> Path | None:
        """Rows in turn: data, and what the averaged codec makes of them. Data that cannot be drawn have none."""
        spec = whole.spec
        if not spec.has_pictures:
            return None
        count = min(len(whole), self.recipe.training.previews // 2)
        x, _ = whole.batch(epoch_order(SEED, 0, len(whole))[:count])
        learner: Learner = trainer.pipeline().learner
        with torch.no_grad(), evaluating(learner):
            y, _ = self.made(learner, x.to(trainer.device), None)
        given, made = spec.to_images(x), spec.to_images(y.cpu())
        rows = []
        for begin in range(0, count, PREVIEWS):
            blank = [np.full_like(given[0], 255)] * (PREVIEWS - len(given[begin : begin + PREVIEWS]))
            rows += [*given[begin : begin + PREVIEWS], *blank, *made[begin : begin + PREVIEWS], *blank]
        path = folder / f"preview-{trainer.step:06d}.png"
        return write_png(path, tile(rows, PREVIEWS))

    def describe(self, trainer: Trainer, data: str) -> list[str]:
        recipe, choice = self.recipe, self.choice
        shape = learner_of(trainer).codec.latent_shape(self.dataset.spec.shape)
        cost = codec_cost(recipe.modules(self.dataset.spec), self.dataset.spec.shape)
        less = math.prod(self.dataset.spec.shape) / math.prod(shape)
        terms = [
            {"l1": "absolute error", "l2": "squared error"}[choice.distance],
            f"a codebook of {choice.codebook} vectors" if choice.codebook else f"divergence x {choice.kl:g}",
            f"distance of features of {self.perceives} x {choice.perceptual:g}"
            if self.features is not None
            else "no perceptual term",
            f"a discriminator x {choice.adversarial:g} from {choice.adversarial_from:.0%} of the run"
            if choice.adversarial
            else "no discriminator",
        ]
        return [
            f"data       {data}: {self.dataset.describe()}; autoencoder {recipe.model.size}, {cost}"
            f"{f'; augmented: {recipe.augment}' if recipe.augment else ''}",
            f"objective  latents {'x'.join(map(str, shape))}, {less:.3g} times fewer numbers than the data; "
            f"{', '.join(terms)}",
        ]


@final
class Trained:
    """A codec as it is learned so far; :meth:`save` measures its latents and writes it."""

    def __init__(self, task: Autoencoding, learner: Learner, info: Mapping[str, Any], items: int) -> None:
        self.task, self.learner, self.info, self.items = task, learner, dict(info), items

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> Path:
        """Write ``codec.safetensors``; ``weights``: as for :meth:`.Pipeline.save`."""
        learner = copy.deepcopy(self.learner)
        if weights is not None:
            learner.load_state_dict(dict(weights))
        codec, data = learner.codec.eval().requires_grad_(False), self.task.dataset
        codec.spec, codec.info = replace(data.spec, classes=(), vocabulary=()), self.info
        measure(codec, self._batches(), data.name)
        return codec.save(folder)

    def _batches(self) -> Iterator[Tensor]:
        data = self.task.dataset
        where = np.unique(np.linspace(0, len(data) - 1, min(len(data), self.items)).astype(np.int64))
        for begin in range(0, len(where), 64):
            yield data.batch(where[begin : begin + 64])[0]


@final
class Reconstructions:
    """Held-out items, and how well they are made again: the mean of the posterior is decoded, nothing is drawn."""

    def __init__(self, task: Autoencoding, dataset: Dataset, device: torch.device) -> None:
        self.task, self.dataset, self.device = task, dataset, device
        count = min(len(dataset), draws(task.recipe.training))
        self.items = np.sort(epoch_order(SEED, 0, len(dataset))[:count])

    def describe(self, whole: Dataset) -> str:
        return (
            f"{len(self.dataset):,} of {len(whole):,} items, never trained on; {len(self.items):,} of them are made "
            f"again every {self.task.recipe.training.evaluate_every:,} updates"
        )

    def band_names(self, schedule: Any) -> list[str]:
        return []

    def evaluate(self, trainer: Trainer, curve: Curve) -> tuple[Evaluation, Tensor]:
        raw, _ = self.losses(cast(Learner, trainer.weights()))
        ema, figures = self.losses(trainer.pipeline().learner)
        before = curve.before(trainer.images)

        def error(values: Tensor) -> float | None:
            return finite(values.std() / math.sqrt(len(values))) if len(values) > 1 else None

        row = Evaluation(
            step=trainer.step,
            images=trainer.images,
            raw=finite(raw.mean()),
            ema=finite(ema.mean()),
            error=error(ema),
            noise=None if before is None else error(ema - before),
            raw_bands=(),
            ema_bands=(),
            probes=figures,
        )
        return row, ema

    def losses(self, learner: Learner) -> tuple[Tensor, dict[str, dict[str, float | None]]]:
        """The loss of each item, ``[count]`` float64, without the discriminator; and what people want to know."""
        spec, losses, errors, numbers = self.dataset.spec, [], [], []
        with torch.no_grad(), evaluating(learner):
            for begin in range(0, len(self.items), 64):
                x = self.dataset.batch(self.items[begin : begin + 64])[0].to(self.device)
                y, extra = self.task.made(learner, x, None)
                losses.append((self.task.apart(x, y) + extra).double().cpu())
                errors.append((x - y).square().flatten(1).mean(1).double().cpu())
                if learner.codec.codebook is not None:
                    numbers.append(learner.codec.nearest(learner.codec.posterior(x)[0].float()).flatten().cpu())
        # Of bounded data the peak is the range, 2 in model units; of others the deviation, 1.
        name, peak = ("PSNR, dB", 2.0) if spec.bounded else ("signal to error, dB", 1.0)
        ratio = 10 * (peak**2 / torch.cat(errors).clamp(min=1e-20)).log10().mean()
        figures: dict[str, dict[str, float | None]] = {"reconstruction": {name: finite(ratio)}}
        if numbers:
            assert learner.codec.codebook is not None
            figures["codebook"] = {"vectors in use (perplexity)": perplexity(torch.cat(numbers), self.task.config)}
        return torch.cat(losses), figures


def perplexity(numbers: Tensor, config: Mapping[str, Any]) -> float:
    """How many vectors of the codebook would be used if all that are were used alike: exp(entropy)."""
    share = torch.bincount(numbers, minlength=config["codebook"]).double() / len(numbers)
    return float(torch.special.entr(share).sum().exp())
