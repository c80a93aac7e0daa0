"""The callback that draws a GAN: when, where it is written, and that training does not notice."""

import io

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gpkit.data import Digits, EightGaussians
from gpkit.lightning.gan.figures.callback import GANFigures
from gpkit.models import ImageCritic, ImageGenerator, PointCritic, PointGenerator


class GAN(pl.LightningModule):
    """The least that can be drawn: a critic, samples, and steps that draw random numbers."""

    def __init__(self, generator, critic, conditional=False):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = generator, critic
        self.conditional = conditional
        self.asked = []

    def sample(self, n, y=None):
        self.asked.append((n, y))
        z = torch.randn(n, self.generator.latent_dim)
        return self.generator(z) if y is None else self.generator(z, y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def validation_step(self, batch, _):  # the data have validation sets
        raise NotImplementedError

    def training_step(self, batch, _):
        x, y = batch
        y = [y] if self.conditional else []
        fake = self.generator(torch.randn(len(x), self.generator.latent_dim), *y)
        loss = (self.critic(fake, *y) - self.critic(x, *y)).mean()
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def points_gan(num_classes=0):
    torch.manual_seed(0)
    options = {"width": 16, "depth": 1, "num_classes": num_classes}
    nets = PointGenerator(2, (2,), **options), PointCritic((2,), **options)
    return GAN(*nets, conditional=num_classes > 0)


def images_gan(num_classes=0):
    torch.manual_seed(0)
    options = {"width": 8, "num_classes": num_classes}
    nets = ImageGenerator(2, (1, 8, 8), **options), ImageCritic((1, 8, 8), **options)
    return GAN(*nets, conditional=num_classes > 0)


def fit(module, data, folder, *callbacks, epochs=2, logger=None, **options):
    torch.manual_seed(1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=0,
        log_every_n_steps=1,
        logger=TensorBoardLogger(folder, name="", version="") if logger is None else logger,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, **data)
    return trainer


def eight():
    return {"datamodule": EightGaussians(n=400, batch_size=64, val_size=0, test_size=120)}


def digits():
    return {"datamodule": Digits(train_size=100, val_size=0)}


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0})
    found.Reload()
    return found


def colors(image):
    """Return the distinct pixels of a PNG, given as a path or as bytes."""
    pixels = np.asarray(Image.open(image))
    return {tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[-1])}


def test_points_reach_tensorboard_and_the_folder(tmp_path):
    # catches figures that are not written, at another step, or once only
    trainer = fit(points_gan(), eight(), tmp_path, GANFigures(1, points=50))
    found = events(tmp_path)
    assert found.Tags()["images"] == ["samples", "surface"]
    for name in ("samples", "surface"):
        images = found.Images(name)
        assert [image.step for image in images] == [5, 10]  # 280 points are 5 batches
        last = Image.open(io.BytesIO(images[-1].encoded_image_string))
        saved = Image.open(tmp_path / "figures" / f"{name}.png")
        assert (np.asarray(last) == np.asarray(saved)).all()
        assert (np.asarray(saved) != np.asarray(saved)[0, 0]).any()
    assert trainer.global_step == 10


def test_coverage_is_logged_for_data_that_have_modes(tmp_path):
    # catches metrics that miss the logger, or that count other samples than asked for
    data, module = eight(), points_gan()
    places = data["datamodule"].modes[[0, 0, 1, 2]].float() + torch.tensor(
        [[0.0, 0], [1, 0], [0, 0], [0, 0]]
    )
    module.sample = lambda n: places.repeat(n // 4, 1)
    trainer = fit(module, data, tmp_path, GANFigures(1, points=40), epochs=1)
    assert trainer.callback_metrics["modes/covered"] == 3
    assert trainer.callback_metrics["modes/high_quality"] == 0.75
    found = events(tmp_path)
    assert [scalar.value for scalar in found.Scalars("modes/covered")] == [3]
    assert [scalar.value for scalar in found.Scalars("modes/high_quality")] == [0.75]


def test_other_data_log_no_coverage(tmp_path):
    # catches a callback that needs a data module
    x = torch.randn(64, 2)
    loader = DataLoader(TensorDataset(x, torch.zeros(64)), batch_size=32)
    trainer = fit(points_gan(), {"train_dataloaders": loader}, tmp_path, GANFigures(1, points=9))
    assert "modes/covered" not in trainer.callback_metrics
    assert events(tmp_path).Tags()["images"] == ["samples", "surface"]


def test_images_are_drawn_as_grids(tmp_path):
    # catches a surface for images, and a grid of another size
    module = images_gan()
    fit(module, digits(), tmp_path, GANFigures(1, columns=5), epochs=1)
    assert module.asked == [(25, None)]
    assert events(tmp_path).Tags()["images"] == ["samples"]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["samples.png"]


@pytest.mark.parametrize(("every", "epochs", "drawn"), [(1, 3, 3), (2, 5, 3), (10, 3, 1)])
def test_how_often(tmp_path, every, epochs, drawn):
    # catches an off-by-one in the epochs, and a last epoch that is not drawn
    module = images_gan()
    fit(module, digits(), tmp_path, GANFigures(every, columns=1), epochs=epochs)
    assert len(module.asked) == drawn


def test_the_last_epoch_may_be_cut_short(tmp_path):
    # catches a run by max_steps that ends without a figure
    module = points_gan()
    fit(module, eight(), tmp_path, GANFigures(10, points=5), epochs=-1, max_steps=7)
    assert len(module.asked) == 1


@pytest.mark.parametrize("gan", [points_gan, images_gan])
def test_training_does_not_notice(tmp_path, gan):
    # catches random numbers that are drawn, a mode that is left, and a loader that is asked
    def trained(*callbacks):
        module = gan()
        module.critic.net.features.append(nn.Dropout(0.2))
        data = eight() if gan is points_gan else digits()
        fit(module, data, tmp_path / str(len(callbacks)), *callbacks, epochs=3)
        assert module.critic.training
        return torch.cat([p.detach().flatten() for p in module.parameters()]), torch.rand(3)

    plain, plain_draws = trained()
    watched, watched_draws = trained(GANFigures(1, points=9, columns=3))
    assert torch.equal(plain, watched)
    assert torch.equal(plain_draws, watched_draws)


def test_parts_are_evaluated_and_keep_the_mode_that_they_had(tmp_path):
    # catches dropout in the figures, and a part in evaluation mode that is put into training mode
    module = points_gan()
    modes = []
    sample = module.sample

    def looked_at(n):
        modes.append((module.critic.training, module.generator.training))
        return sample(n)

    module.sample = looked_at

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.generator.eval()

        def on_train_epoch_end(self, trainer, pl_module):
            modes.append((pl_module.critic.training, pl_module.generator.training))

    fit(module, eight(), tmp_path, GANFigures(1, points=5), Look(), epochs=1)
    assert modes == [(False, False), (True, False)]


@pytest.mark.parametrize("gan", [points_gan, images_gan])
def test_samples_have_the_labels_of_the_data(tmp_path, gan):
    # catches a critic with labels that is asked without them, and labels that are not the data's
    module = gan(num_classes=10)
    data = eight() if gan is points_gan else digits()
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch[1])

    callback = GANFigures(1, points=100, columns=9)
    fit(module, data, tmp_path, Look(), callback, epochs=1)
    ((n, y),) = module.asked
    assert n == len(y) == (100 if gan is points_gan else 81)
    assert torch.equal(y, torch.cat(seen)[:n])


def test_fewer_data_than_samples_repeat_their_labels(tmp_path):
    # catches labels that are fewer than the samples
    module = points_gan(num_classes=8)
    fit(module, eight(), tmp_path, GANFigures(1, points=700), epochs=1)
    ((n, y),) = module.asked
    assert n == len(y) == 700
    assert torch.equal(y[:280], y[280:560])


def test_without_tensorboard_the_figures_lie_in_the_root(tmp_path):
    # catches a callback that fails without TensorBoard
    logger = CSVLogger(tmp_path / "csv")
    fit(points_gan(), eight(), tmp_path, GANFigures(1, points=5), epochs=1, logger=logger)
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == ["samples.png", "surface.png"]


def test_data_that_cannot_be_drawn_are_refused(tmp_path):
    # catches an error after the first epoch
    loader = DataLoader(TensorDataset(torch.randn(8, 30), torch.zeros(8)), batch_size=4)
    module = GAN(PointGenerator(2, (30,)), PointCritic((30,)))
    with pytest.raises(ValueError, match=r"points in the plane.*got \[4, 30\]: leave it out") as e:
        fit(module, {"train_dataloaders": loader}, tmp_path, GANFigures())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("option", ["every_n_epochs", "points", "columns"])
def test_wrong_options_are_refused(option):
    # catches a callback that never draws, or draws nothing
    with pytest.raises(ValueError, match=rf"`GANFigures\({option}=\.\.\.\)` .* >= 1; got 0"):
        GANFigures(**{option: 0})
