"""A critic and a generator, trained against each other with gradient penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.compat import tree_map_only
from gpkit.autodiff.random import derived_seed, rank, seeded
from gpkit.lightning.compat import logs_now, scaler_of
from gpkit.lightning.gan.checks import (
    optional,
    require_functions,
    require_nets,
    require_penalties,
    unpack,
)
from gpkit.lightning.gan.ema import averaged_copy, evaluating, update_average
from gpkit.lightning.gan.logging import evaluation_scalars, optimality_scalars, slope_scalars
from gpkit.lightning.gan.losses import GANLoss, gan_loss
from gpkit.lightning.gan.objectives import AllTerms, Micro, Objective, Objectives
from gpkit.lightning.gan.scores import Scores, conditioned, scores_of
from gpkit.lightning.gan.stepping import backward, require_support, step
from gpkit.lightning.recording import (
    EVALUATION,
    Histograms,
    LatestScalars,
    penalty_scalars,
)
from gpkit.sums import Penalties, PenaltySum, as_sum

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


MakeScheduler = Callable[[torch.optim.Optimizer], Any]


Part = Callable[[Micro], Tensor | None]  # of what is trained on


class GANModule(pl.LightningModule):
    """A critic D and a generator G, for batches ``x``, ``(x,)`` or ``(x, y)``.

    Every batch is a step of the critic, every ``critic_steps``-th one of the generator as well,
    with latents z ~ N(0, I) of its own. Penalties count the steps of the net that they are on;
    ``trainer.global_step``, and so ``max_steps``, counts the steps of all optimisers.

    On the steps that the trainer logs, and the last of an epoch, it logs the latest of:
    ``train/critic_loss`` and ``train/generator_loss`` (without penalties); ``penalty/<name>``
    (weighted, as it enters the loss) and ``penalty/<name>/weight``; the critic's slopes ‖∇D‖ on
    real and fake samples and on interpolates of the two: ``slope/real``, ``slope/fake`` and
    ``slope/interpolates`` are their means, and each has ``.../max`` and ``.../above_center``, the
    share of samples above the penalty's centre, or 1; ``critic_optimality``, zero at the critic's
    optimum (`gpkit.lightning.gan.slopes.optimality`), where penalties have no steps of their own;
    and for the Wasserstein loss ``wasserstein/raw``, E D(x) − E D(y), and
    ``wasserstein/debiased``, the same over the mean slope on interpolates. Slopes and norms have
    TensorBoard histograms. At validation and test it logs ``<stage>/critic_loss``,
    ``<stage>/generator_loss`` and the two Wasserstein estimates, means over batches, with latents
    that are the same each time.

    Gradients are averaged over processes before each optimiser's step, under every DDP strategy but
    a static graph, whatever parameters a loss has reached: with losses that are means, as on one
    process with the joint batch. Pairs, and batch statistics, are of each process. A batch norm in
    the critic couples the samples, and the slope of a sample then means little: layer or group
    norms do not. Under "16-mixed" penalties are taken in float32, since their inner gradient has no
    scale to keep it from vanishing.
    ``Trainer(accumulate_grad_batches=..., gradient_clip_val=...)`` need automatic optimisation:
    use ``accumulate`` and ``gradient_clip``.

    Args:
        generator: ``generator(z)`` with z ``[B, latent_dim]``; one without trained parameters is
            taken as it is.
        critic: ``critic(x)``, which gives ``[B]``, ``[B, 1]`` or maps of scores ``[B, ...]``.
        latent_dim: the length of z.
        loss: "wasserstein", "non_saturating", "minimax", "hinge", "relativistic" (in pairs), or a
            `GANLoss`: see `gpkit.lightning.gan.losses.gan_loss`.
        penalty: of the critic: one, several by name, or None.
        generator_penalty: of the generator in z or in its weights, as ``gpkit.path_length()``.
        critic_optimizer: parameters -> optimiser; None is Adam(1e-4, betas=(0, 0.9)). For a lazy
            penalty in a step of its own, ``partial(Adam, **gpkit.lazy_adam(lr, betas, every))``.
        generator_optimizer: likewise.
        critic_scheduler: optimiser -> learning-rate scheduler, stepped after each of its steps.
        generator_scheduler: likewise.
        critic_steps: steps of the critic for one of the generator.
        conditional: whether the nets take the labels y as well: ``generator(z, y)`` and
            ``critic(x, y)``. If not, labels in a batch are left out.
        ema: the decay of ``ema_generator``, an average of the generator that `sample` takes; None
            for no average.
        accumulate: the batches of one step. Fewer are left at the end of an epoch.
        clip: the bound of every weight of the critic after its steps, as of the first WGAN.
        gradient_clip: the greatest norm of a step's gradient.
        simultaneous: whether both gradients are taken at the same point, before either step.
        penalty_steps: whether penalties have a step of their own after that of the loss, as
            StyleGAN2 does with lazy ones.
        seed: of the latents, and whatever else the nets draw; None takes torch's initial seed. Each
            rank draws its own.
        histogram_every_n_epochs: how often histograms are written; 0 is never.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if one is out of its range, or two do not go together.

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
        seed: int | None = None,
        histogram_every_n_epochs: int = 5,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        require_nets(generator, critic)
        self.generator, self.critic = generator, critic
        self.latent_dim = checks.integer("latent_dim=...", latent_dim, 1)
        self.loss = gan_loss(loss)
        self.penalties = as_sum(penalty)
        self.generator_penalties = as_sum(generator_penalty)
        require_penalties(
            self.penalties, self.generator_penalties, trains_generator=self.trains_generator
        )
        require_functions(
            critic_optimizer=critic_optimizer,
            generator_optimizer=generator_optimizer,
            critic_scheduler=critic_scheduler,
            generator_scheduler=generator_scheduler,
        )
        self.make_optimizer = {"critic": critic_optimizer, "generator": generator_optimizer}
        self.make_scheduler = {"critic": critic_scheduler, "generator": generator_scheduler}
        self.critic_steps = checks.integer("critic_steps=...", critic_steps, 1)
        self.conditional = conditional
        self.ema = optional("ema=...", ema, 0, below=1)
        self.ema_generator = None if ema is None else averaged_copy(generator)
        self.accumulate = checks.integer("accumulate=...", accumulate, 1)
        self.clip = optional("clip=...", clip, 0)
        self.gradient_clip = optional("gradient_clip=...", gradient_clip, 0)
        if simultaneous and penalty_steps:
            raise ValueError("`penalty_steps=True` has steps after one another: not simultaneous")
        self.simultaneous, self.penalty_steps = simultaneous, penalty_steps
        self.seed = seed if seed is None else checks.integer("seed=...", seed, 0)
        self.numbers = LatestScalars()
        self.histograms = Histograms(
            checks.integer("histogram_every_n_epochs=...", histogram_every_n_epochs, 0)
        )
        self.counts = {"critic": 0, "generator": 0, "draws": 0}  # steps, and seeds that were drawn
        self._window: list[Micro] = []

    def forward(self, z: Tensor, y: Any = None) -> Tensor:
        """Return what the generator makes of latents z, ``[B, latent_dim]``, and labels."""
        return conditioned(self.generator, y)(z)

    @torch.no_grad()
    def sample(self, n: int, y: Any = None, *, seed: int = 0) -> Tensor:
        """Return samples of the generator, of its average if there is one, in evaluation mode.

        The latents are a function of ``seed`` alone, so that figures of one run can be compared;
        training goes on as if no samples had been drawn.

        Args:
            n: how many.
            y: their labels, if the nets take labels.
            seed: of the latents.

        Returns:
            ``[n, *S]``.
        """
        net = self.generator if self.ema_generator is None else self.ema_generator
        seed = derived_seed("sample", seed)
        with seeded(seed, self.device), evaluating(net):
            return conditioned(net, y)(self._latents(n))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take a batch; with the last of a step, train the critic, and the generator in turn."""
        self._window.append(unpack(batch, conditional=self.conditional))
        if len(self._window) == self.accumulate or self.trainer.is_last_batch:
            window, self._window = self._window, []
            self._train(window)
        if logs_now(self.trainer) or self.trainer.is_last_batch:
            for name, number in self.numbers.means().items():
                self.log(name, number, prog_bar=name.endswith("_loss"))

    def _train(self, window: list[Micro]) -> None:
        """Make a step of the critic, and one of the generator if it is its turn."""
        self.numbers.begin_step()
        turn = (self.counts["critic"] + 1) % self.critic_steps == 0
        due: list[tuple[str, Part]] = [("critic", self._critic_loss)]
        if self.penalty_steps:
            due.append(("critic", self._critic_penalties))
        if turn and self.trains_generator:
            due.append(("generator", self._generator_loss))
            if self.penalty_steps:
                due.append(("generator", self._generator_penalties))
        self.counts["draws"] += 1
        with seeded(derived_seed(self._own_seed(), rank(), self.counts["draws"]), self.device):
            if self.simultaneous:
                found = [name for name, term in due if self._differentiate(name, term, window)]
                for name in found:
                    self._step(name)
            else:
                for name, term in due:
                    if self._differentiate(name, term, window):
                        self._step(name)
        for name in dict(due):
            self.counts[name] += 1
        if "generator" in dict(due) and self.ema is not None and self.ema_generator is not None:
            update_average(self.ema_generator, self.generator, self.ema)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log losses and Wasserstein estimates of a batch."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log losses and Wasserstein estimates of a batch."""
        self._evaluate(batch, batch_idx, "test")

    def on_fit_start(self) -> None:
        """Refuse what gradients would be wrong under."""
        require_support(self.trainer, simultaneous=self.simultaneous)
        self._window.clear()

    def configure_optimizers(self) -> Any:
        """Return the optimisers of the critic and of a generator that is trained."""
        nets = {"critic": self.critic, "generator": self.generator}
        if not self.trains_generator:
            del nets["generator"]
        configured = []
        for name, net in nets.items():
            make, schedule = self.make_optimizer[name] or default_adam, self.make_scheduler[name]
            optimizer = make([p for p in net.parameters() if p.requires_grad])
            scheduler = {} if schedule is None else {"lr_scheduler": schedule(optimizer)}
            configured.append({"optimizer": optimizer, **scheduler})
        return configured

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, which no scaler scales any more."""
        if self.gradient_clip is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.gradient_clip)

    def on_train_epoch_end(self) -> None:
        """Write the histograms that the epoch has collected."""
        self.histograms.write_collected(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counts and the state of the penalties: plain numbers."""
        checkpoint["gpkit_gan"] = {**self.counts, "seed": self.seed}
        for key, penalties in self._all_penalties().items():
            checkpoint[key] = penalties.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from them; a penalty that is new begins at its beginning."""
        counts = dict(checkpoint["gpkit_gan"])
        self.seed = counts.pop("seed")
        self.counts = counts
        for key, penalties in self._all_penalties().items():
            penalties.load_state_dict(checkpoint[key])

    @property
    def trains_generator(self) -> bool:
        """Whether the generator has parameters that require grad."""
        return any(p.requires_grad for p in self.generator.parameters())

    # What is trained on: of one batch a number, or None where there is none.

    @property
    def objectives(self) -> Objectives:
        """The two nets with their loss and penalties."""
        return Objectives(
            self.generator,
            self.critic,
            self.loss,
            self.penalties,
            self.generator_penalties,
            penalty_steps=self.penalty_steps,
            full_precision=scaler_of(self.trainer) is not None,
        )

    def _critic_loss(self, micro: Micro) -> Tensor | None:
        z, now = self._latents(len(micro[0])), self.counts["critic"]
        found = self.objectives.of_critic(micro, z, now)
        penalties = {} if self.penalty_steps else self.penalties
        self._record(found, penalties, "train/critic_loss")
        assert found.scores is not None
        self._record_critic(found.scores, found.terms)
        return found.total

    def _critic_penalties(self, micro: Micro) -> Tensor | None:
        now = self.counts["critic"]
        found = self.objectives.penalties_of_critic(
            micro, lambda: self._latents(len(micro[0])), now
        )
        return self._record(found, self.penalties)

    def _generator_loss(self, micro: Micro) -> Tensor | None:
        z, now = self._latents(len(micro[0])), self.counts["generator"]
        penalties = {} if self.penalty_steps else self.generator_penalties
        found = self.objectives.of_generator(micro, z, now)
        return self._record(found, penalties, "train/generator_loss")

    def _generator_penalties(self, micro: Micro) -> Tensor | None:
        z, now = self._latents(len(micro[0])), self.counts["generator"]
        found = self.objectives.penalties_of_generator(micro, z, now)
        return self._record(found, self.generator_penalties)

    def _record(self, found: Objective, penalties: Iterable[str], name: str = "") -> Tensor | None:
        """Keep what is logged of an objective, and return what is trained on."""
        if found.loss is not None:
            self.numbers.add({name: found.loss})
        self.numbers.add(penalty_scalars(penalties, found.terms))
        self.histograms.collect_norms(self.trainer, found.terms)
        return found.total

    def _latents(self, n: int) -> Tensor:
        like = next(self.critic.parameters())
        return torch.randn(n, self.latent_dim, device=self.device, dtype=like.dtype)

    # Steps.

    def _differentiate(self, name: str, part: Part, window: list[Micro]) -> bool:
        """Take the gradient of the mean over the batches of a step; say whether there is one."""
        self._optimizer(name).zero_grad()
        found = False
        for micro in window:
            total = part(micro)
            if total is not None and total.requires_grad:
                backward(self, total / len(window))
                found = True
        return found

    def _step(self, name: str) -> None:
        step(self, self._optimizer(name), getattr(self, name))
        if name == "critic" and self.clip is not None:
            with torch.no_grad():
                for p in filter(lambda p: p.requires_grad, self.critic.parameters()):
                    p.clamp_(-self.clip, self.clip)

    def _optimizer(self, name: str) -> LightningOptimizer:
        optimizers = self.optimizers()
        both = optimizers if isinstance(optimizers, list) else [optimizers]
        return both[name == "generator"]

    def _own_seed(self) -> int:
        if self.seed is None:
            self.seed = torch.initial_seed() % 2**63
        return self.seed

    def _all_penalties(self) -> dict[str, PenaltySum]:
        """Return penalties by name, by what a checkpoint calls them."""
        return {
            "gpkit_penalties": self.penalties,
            "gpkit_generator_penalties": self.generator_penalties,
        }

    # What is logged.

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        # Slopes need a graph, which inference mode and its tensors cannot give.
        with torch.inference_mode(False), torch.no_grad():
            batch = tree_map_only(Tensor, Tensor.clone, batch)
            real, labels = micro = unpack(batch, conditional=self.conditional)
            seed = derived_seed(self._own_seed(), rank(), stage, batch_idx)
            with seeded(seed, self.device):
                fake = self.objectives.fakes(micro, self._latents(len(real)))
            scores = scores_of(self.critic, real, fake, labels, [])
            numbers = evaluation_scalars(self.critic, self.loss, scores, seed)
        for name, number in numbers.items():
            self.log(f"{stage}/{name}", number, batch_size=len(real), **EVALUATION)

    def _record_critic(self, scores: Scores, terms: AllTerms) -> None:
        """Keep what scores, norms and, where it is logged, slopes tell about the critic."""
        now = self.counts["critic"]
        self.numbers.add(optimality_scalars(self.loss, self.penalties, scores, terms, now))
        if not logs_now(self.trainer, ahead=self.accumulate):
            return
        seed = derived_seed(self._own_seed(), rank(), "slopes", now)
        numbers, steep = slope_scalars(self.critic, self.loss, self.penalties, scores, seed)
        self.numbers.add(numbers)
        for where, n in steep.items():
            self.histograms.collect(self.trainer, f"slope/{where}", n)


def default_adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return Adam with the learning rate and the decays of Gulrajani et al. (2017)."""
    return torch.optim.Adam(parameters, lr=1e-4, betas=(0.0, 0.9))
