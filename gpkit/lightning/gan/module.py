"""`GANModule`: trains a critic and a generator with gradient penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.random import derived_seed, rank, seeded
from gpkit.lightning.compat import logs_now, scaler_of
from gpkit.lightning.gan.checks import (
    optional_number,
    require_nets,
    require_order,
    require_penalties,
)
from gpkit.lightning.gan.ema import averaged_copy, evaluating
from gpkit.lightning.gan.latents import Path, parts_of
from gpkit.lightning.gan.logging import log_evaluation
from gpkit.lightning.gan.losses import GANLoss, gan_loss
from gpkit.lightning.gan.objectives import Objectives, compiled_losses
from gpkit.lightning.gan.samples import MicroBatch, conditioned, unpack_samples
from gpkit.lightning.gan.stepping import (
    MakeOptimizer,
    MakeScheduler,
    configured,
    step_schedulers,
)
from gpkit.lightning.gan.support import require_started
from gpkit.lightning.gan.training import GANStep
from gpkit.lightning.recording import Histograms, LatestScalars, LatestStep
from gpkit.lightning.refusals import require_functions
from gpkit.sums import Penalties, PenaltySum, as_sum, examined


class GANModule(pl.LightningModule):
    r"""Trains a critic D and a generator G against each other, on ``x``, ``(x, y)`` or dicts.

    Each net is trained on its loss L and its penalties P_p,

    .. math:: L_\text{total} = \frac1s \Big(L + \sum_p P_p\Big).

    The losses are in `gpkit.lightning.gan.losses.gan_loss`. P_p is a penalty with its weight
    λ_p(t), see `gpkit.GradientPenalty`. s is 1, or max(1, λ_p(t)) with a `rescaled` weight (of
    several, the greatest).

    Every batch is one step of the critic (with ``accumulate``, several batches are), and every
    ``critic_steps``-th step also one of the generator, each with its own latents z ~ N(0, I). A
    penalty counts the steps of its own net. ``trainer.global_step``, and so ``max_steps``, counts
    the steps of all optimisers.

    On the steps that the trainer logs, and on the last batch of an epoch, it logs the latest value
    of

    - ``train/critic_loss`` and ``train/generator_loss``, without penalties;
    - for each penalty ``penalty/<name>`` (weighted, as it enters the loss),
      ``penalty/<name>/weight``, and where it acts ``penalty/<name>/norm`` (the mean norm);
    - the slopes ‖∇D‖ of the critic on real samples, fake samples and interpolates:
      ``slope/<points>`` is the mean, ``slope/<points>/max`` the maximum, and
      ``slope/<points>/above_center`` the fraction above the centre of the penalty (1 if it has
      none);
    - ``critic_optimality``, which is 0 at the critic's optimum: see
      `gpkit.lightning.gan.slopes.optimality`. It is not logged with ``penalty_steps=True``;
    - with the Wasserstein loss ``wasserstein/raw``, E D(x) − E D(y), and ``wasserstein/debiased``,
      the same divided by the mean slope on interpolates.

    TensorBoard gets the histograms ``penalty/<name>/norm/histogram`` and
    ``slope/<points>/histogram``. At validation and test the module logs ``<stage>/critic_loss``,
    ``<stage>/generator_loss`` and the two Wasserstein estimates, averaged over batches. The latents
    of a batch are the same each time.

    Gradients are averaged over processes before each step, under every DDP strategy but a static
    graph, and under FSDP2. Losses are means, so this equals one process with the joint batch; pairs
    and batch norm statistics are per process. Batch norm in the critic makes the slope of one
    sample depend on the others, so use layer or group norm. With precision "16-mixed" penalties are
    evaluated in float32, since no scaler scales their inner gradient. Instead of
    ``Trainer(accumulate_grad_batches=..., gradient_clip_val=...)``, which need automatic
    optimisation, use ``accumulate`` and ``gradient_clip``.

    Args:
        generator: ``generator(z)`` with z ``[B, latent_dim]``; without parameters that require grad
            it is not trained. For batches that are dicts it returns a dict of some of their
            entries; the others, as labels and masks, are those of the real samples.
        critic: ``critic(x)``; where a batch is a dict it is called with the dict, or by keyword if
            its ``forward`` has these names. It returns scores ``[B]``, ``[B, 1]`` or ``[B, ...]``,
            or a list of them, whose loss is the sum over these scales, as in pix2pixHD (SPADE has
            the mean); penalties differentiate the sum over the scales of a sample's mean score.
        latent_dim: the length of z.
        loss: "wasserstein", "non_saturating", "minimax", "hinge", "relativistic" (in pairs), or a
            `GANLoss`. See `gpkit.lightning.gan.losses.gan_loss` for the formulas.
        penalty: penalties of the critic: one, a list, a dict by name, a `gpkit.sum`, or None.
        generator_penalty: penalties of the generator, such as ``gpkit.path_length()``: in its
            weights, or in its input, which is w where it has a mapping (see ``mapping``), else z.
        critic_optimizer: parameters -> optimiser; None is Adam(lr=1e-4, betas=(0, 0.9)). For lazy
            penalties with ``penalty_steps=True`` use
            ``partial(Adam, **gpkit.lazy_adam(lr, betas, every))``.
        generator_optimizer: the same for the generator.
        critic_scheduler: optimiser -> learning-rate scheduler, stepped after each optimiser step.
        generator_scheduler: the same for the generator.
        critic_steps: steps of the critic for each step of the generator.
        conditional: whether the nets take labels: ``generator(z, y)`` and ``critic(x, y)``. If not,
            labels in a batch are ignored.
        ema: decay in [0, 1) of ``ema_generator``, the exponential moving average of the generator,
            from which `sample` samples; None is no average.
        accumulate: micro-batches per step; the last step of an epoch may have fewer.
        clip: bound of the absolute value of each critic weight after a step, as in the first WGAN.
        gradient_clip: bound of the norm of the gradient of each optimiser step.
        simultaneous: whether to differentiate both nets before either optimiser steps.
        penalty_steps: whether penalties have optimiser steps of their own, after that of the loss,
            as StyleGAN2 does with lazy penalties. They step every trained parameter of the net,
            with a gradient of zero where the penalties do not reach, as `gpkit.lazy_adam` supposes.
        generator_first: whether the generator steps before the critic, as in StyleGAN2's code;
            then it steps with the first of every ``critic_steps`` steps of the critic.
        mapping: the names of two parts of the generator, for w = mapping(z) (or of z and y) and
            synthesis(w). Its penalties are then in w, and train the mapping too, as in StyleGAN2.
            "auto": ``("mapping", "synthesis")`` if it has both; None: in z.
        generator_penalty_shrink: the generator's penalties act on the first B // shrink latents of
            a batch of B; StyleGAN2's path length has 2.
        pac: samples in a pack that the critic scores as one, as in PacGAN and CTGAN: it is given
            ``[B / pac, pac * C, *S]``, and labels ``[B / pac, pac]``. A pack has one norm.
        compile: whether to compile the losses of critic and generator, each with its penalties, as
            one graph, see `gpkit.compile`. A step on penalties alone runs as it is.
        seed: of all that the nets draw, on each rank its own; None is torch's initial seed.
        histogram_every_n_epochs: the epochs 0, n, 2n, ... have histograms; 0 means that none has.
        doctor: whether each penalty is checked at its first step. An error names modules at fault.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is out of range, or two arguments exclude each other.
        RuntimeError: at the start of a fit, if strategy or precision of the trainer do not work.

    Sources: Gulrajani et al. (2017), arXiv:1704.00028 (critic steps and optimisers); Arjovsky et
    al. (2017), arXiv:1701.07875 (``clip``); Karras et al. (2020), arXiv:1912.04958
    (``penalty_steps``, ``mapping``); Lin et al. (2018), arXiv:1712.04086 (``pac``); Wang et al.
    (2018), arXiv:1711.11585 (scales).

    >>> import gpkit
    >>> module = GANModule(nn.Linear(2, 3), nn.Linear(3, 1), latent_dim=2, penalty=gpkit.wgan_gp())
    >>> module.sample(5).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        *,
        latent_dim: int,
        loss: str | GANLoss = "wasserstein",
        penalty: Penalties | None = None,
        generator_penalty: Penalties | None = None,
        critic_optimizer: MakeOptimizer | None = None,
        generator_optimizer: MakeOptimizer | None = None,
        critic_scheduler: MakeScheduler | None = None,
        generator_scheduler: MakeScheduler | None = None,
        critic_steps: int = 5,
        conditional: bool = False,
        ema: float | None = None,
        accumulate: int = 1,
        clip: float | None = None,
        gradient_clip: float | None = None,
        simultaneous: bool = False,
        penalty_steps: bool = False,
        generator_first: bool = False,
        mapping: str | Sequence[str] | None = "auto",
        generator_penalty_shrink: int = 1,
        pac: int = 1,
        compile: bool = False,
        seed: int | None = None,
        histogram_every_n_epochs: int = 5,
        doctor: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        require_nets(generator, critic)
        self.generator, self.critic = generator, critic
        self.latent_dim = checks.integer("latent_dim=...", latent_dim, 1)
        self.loss = gan_loss(loss)
        self.penalties = as_sum(penalty)
        self.generator_penalties = as_sum(generator_penalty)
        self.pac = checks.integer("pac=...", pac, 1)
        both = self.penalties, self.generator_penalties
        require_penalties(*both, trains_generator=self.trains_generator, pac=self.pac)
        self.doctor = examined({**self.penalties, **self.generator_penalties}, doctor)
        self.make_optimizer = {"critic": critic_optimizer, "generator": generator_optimizer}
        self.make_scheduler = {"critic": critic_scheduler, "generator": generator_scheduler}
        require_functions(**{f"{net}_optimizer": f for net, f in self.make_optimizer.items()})
        require_functions(**{f"{net}_scheduler": f for net, f in self.make_scheduler.items()})
        self.critic_steps = checks.integer("critic_steps=...", critic_steps, 1)
        self.conditional = conditional
        self.ema = optional_number("ema=...", ema, 0, below=1)
        self.ema_generator = None if ema is None else averaged_copy(generator)
        self.accumulate = checks.integer("accumulate=...", accumulate, 1)
        self.clip = optional_number("clip=...", clip, 0)
        self.gradient_clip = optional_number("gradient_clip=...", gradient_clip, 0)
        require_order(simultaneous, penalty_steps=penalty_steps, generator_first=generator_first)
        self.simultaneous, self.penalty_steps = simultaneous, penalty_steps
        self.generator_first = generator_first
        self.path = Path(generator, parts_of(generator, mapping))
        self.shrink = checks.integer("generator_penalty_shrink=...", generator_penalty_shrink, 1)
        self.compiled = compiled_losses(self) if compile else {}
        self.seed = seed if seed is None else checks.integer("seed=...", seed, 0)
        self.scalars = LatestScalars()
        self.latest_step = LatestStep({}, {})
        self.histograms = Histograms(
            checks.integer("histogram_every_n_epochs=...", histogram_every_n_epochs, 0)
        )
        self.counts = {"critic": 0, "generator": 0, "draws": 0}  # optimiser steps, and draws
        self.window: list[MicroBatch] = []  # the micro-batches of the current step

    def forward(self, z: Tensor, y: Any = None) -> Tensor:
        """Return the generator's output for latents z ``[B, latent_dim]`` and labels."""
        return conditioned(self.generator, y)(z)

    @torch.no_grad()
    def sample(self, n: int, y: Any = None, *, seed: int = 0) -> Tensor:
        """Return samples of the generator in evaluation mode, or of its average if there is one.

        The latents depend on ``seed`` alone, so that figures of one run can be compared. The random
        numbers and modes of training stay unchanged.

        Args:
            n: the number of samples.
            y: their labels, if the nets take labels.
            seed: for the latents.

        Returns:
            The samples, ``[n, *S]``.
        """
        net = self.generator if self.ema_generator is None else self.ema_generator
        seed = derived_seed("sample", seed)
        with seeded(seed, self.device), evaluating(net):
            return conditioned(net, y)(self.latents(n))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Add a micro-batch; with the last one of a step, train the critic and the generator."""
        require_started(self, GANModule)
        self.window.append(unpack_samples(batch, conditional=self.conditional))
        if len(self.window) == self.accumulate or self.trainer.is_last_batch:
            window, self.window = self.window, []
            GANStep(self, window).run()
        if self.trainer.is_last_batch:
            step_schedulers(self, "epoch")
        if logs_now(self.trainer) or self.trainer.is_last_batch:
            for name, scalar in self.scalars.means().items():
                self.log(name, scalar, prog_bar=name.endswith("_loss"))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the losses and Wasserstein estimates of a batch."""
        log_evaluation(self, batch, self.seed_for("val", batch_idx), "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the losses and Wasserstein estimates of a batch."""
        log_evaluation(self, batch, self.seed_for("test", batch_idx), "test")

    def on_fit_start(self) -> None:
        """Check the trainer."""
        require_started(self, GANModule, again=True)

    def configure_optimizers(self) -> Any:
        """Return the optimiser and scheduler of the critic, and of the generator if trained."""
        nets = ["critic", "generator"] if self.trains_generator else ["critic"]
        return [
            configured(getattr(self, net), self.make_optimizer[net], self.make_scheduler[net])
            for net in nets
        ]

    def on_train_epoch_end(self) -> None:
        """Write the histograms of the epoch."""
        self.histograms.write_collected(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counts, the seed and the state of each penalty, as plain numbers."""
        checkpoint["gpkit_gan"] = {**self.counts, "seed": self.seed}
        for key, penalties in self._all_penalties().items():
            checkpoint[key] = penalties.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the same. A penalty that is not in the checkpoint keeps its own state."""
        counts = dict(checkpoint["gpkit_gan"])
        self.seed = counts.pop("seed")
        self.counts = counts
        for key, penalties in self._all_penalties().items():
            penalties.load_state_dict(checkpoint[key])

    @property
    def trains_generator(self) -> bool:
        """Whether the generator has parameters that require grad."""
        return any(p.requires_grad for p in self.generator.parameters())

    @property
    def objectives(self) -> Objectives:
        """The two nets with their loss and penalties."""
        return Objectives(
            self.generator,
            self.critic,
            self.loss,
            self.penalties,
            self.generator_penalties,
            self.latents,
            self.path,
            pac=self.pac,
            shrink=self.shrink,
            penalty_steps=self.penalty_steps,
            full_precision=scaler_of(self.trainer) is not None,
            compiled=self.compiled,
        )

    def latents(self, n: int) -> Tensor:
        """Draw latents z ~ N(0, I), ``[n, latent_dim]``."""
        like = next(self.critic.parameters())
        return torch.randn(n, self.latent_dim, device=self.device, dtype=like.dtype)

    def seed_for(self, *purpose: Any) -> int:
        """Return a seed for a purpose, such as ``("val", batch_idx)``; each rank has its own."""
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**63
        return derived_seed(self.seed, rank(), *purpose)

    def _all_penalties(self) -> dict[str, PenaltySum]:
        """Return the penalties of both nets by their keys in a checkpoint."""
        return {
            "gpkit_penalties": self.penalties,
            "gpkit_generator_penalties": self.generator_penalties,
        }
