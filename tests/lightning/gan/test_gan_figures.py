"""Figures of a GAN: what is drawn, where it is written, and that training does not notice."""

import io
import math

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
from gpkit.lightning.gan.figures import drawings
from gpkit.lightning.gan.figures.callback import GANFigures, scores
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


# --- the callback ---------------------------------------------------------------------------------


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


# --- the drawings ---------------------------------------------------------------------------------


def test_a_surface_has_its_values_where_they_belong():
    # catches axes that are exchanged or upside down
    def critic(points):
        return points[:, :1].sin() + points[:, 1:].square()

    values = drawings.surface(critic, (-1, 3, 0, 2), steps=5)
    by_hand = [[math.sin(-1 + j) + (i / 2) ** 2 for j in range(5)] for i in range(5)]
    torch.testing.assert_close(values, torch.tensor(by_hand))
    assert not values.requires_grad


def test_maps_of_scores_are_averaged():
    # catches scores of patches that are taken for points
    def patches(points):
        return torch.stack([points, 3 * points], dim=1)  # [P, 2, 2]

    values = drawings.surface(patches, (0, 1, 0, 1), steps=2)
    torch.testing.assert_close(values, torch.tensor([[0.0, 1.0], [1.0, 2.0]]))


def test_with_labels_the_surface_is_the_mean_over_labels():
    # catches a mean over the data, in which frequent labels count more
    def critic(x, y):
        return x[:, :1] + y[:, None]

    x, y = torch.randn(3, 2), torch.tensor([1, 1, 1, 4])
    torch.testing.assert_close(scores(critic, x, y), x[:, :1] + 2.5)
    many = torch.arange(1000)
    assert scores(critic, x, many).shape == (3, 1)


def test_samples_lie_on_the_surface_where_they_are():
    # catches a surface that is drawn upside down beneath its points
    box = (0.0, 1.0, 0.0, 1.0)
    values = drawings.surface(lambda p: p[:, 1] + 0.01 * p[:, 0], box)  # high values above
    nowhere = torch.tensor([[9.0, 9.0]])
    figure = drawings.draw_surface(values, box, nowhere, nowhere)
    axes = figure.axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == (box[:2], box[2:])
    pixels = drawings.rendered(figure).astype(int)
    window = axes.get_window_extent()
    column, top = int(window.x0 + window.width / 4), pixels.shape[0] - window.y1
    low = pixels[int(top + 0.9 * window.height), column]
    high = pixels[int(top + 0.1 * window.height), column]
    assert low.sum() > high.sum() + 100  # the colours darken upwards


def test_a_constant_critic_can_be_drawn():
    # catches contours of a constant, of which matplotlib warns, and of what is not a number
    points = torch.randn(5, 2)
    for value in (0.0, float("nan")):
        values = torch.full((9, 9), value)
        assert len(drawings.draw_surface(values, (-1, 1, -1, 1), points, points).axes) == 1


def test_data_and_samples_have_their_places():
    # catches panels that are exchanged
    data, samples = torch.zeros(1, 2), torch.ones(3, 2)
    left, right = drawings.draw_points(data, samples, (-1, 2, -1, 2)).axes
    assert (left.get_title(), right.get_title()) == ("data", "samples")
    assert left.collections[0].get_offsets().tolist() == data.tolist()
    assert right.collections[0].get_offsets().tolist() == samples.tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0)])
def test_images_are_shown_on_the_scale_of_the_data(channels, low, high):
    # catches pixels of [-1, 1] that are clipped at 0, and a scale of the samples' own
    data = torch.full((4, channels, 2, 2), low)
    data[0] = high
    samples = torch.full((4, channels, 2, 2), (low + high) / 2)
    left, right = drawings.draw_images(data, samples, columns=2).axes
    shown = [np.asarray(axes.images[0].get_array()) for axes in (left, right)]
    assert [s.shape[:2] for s in shown] == [(5, 5), (5, 5)]
    assert (shown[0][:2, :2] == 1).all()
    assert (shown[0][:2, 3:] == 0).all()
    assert (shown[1][3:, 3:] == 0.5).all()


def test_tiles_lie_in_rows():
    # catches images that are cut, turned or laid out by columns
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 2, 2, 3)
    tiles = drawings.tile(images, columns=3)
    assert tiles.shape == (2, 5, 11)
    assert tiles[1, 0, ::4].tolist() == [0, 1, 2]
    assert tiles[0, 4, 2::4].tolist() == [3, 4, 5]
    assert (tiles[:, 2] == 1).all()


def test_a_box_holds_all_points():
    # catches a box that is not square, and one without extent
    points = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    left, right, bottom, top = drawings.box_around(points, margin=0.1)
    assert (left, right, bottom, top) == pytest.approx((-0.2, 2.2, -0.7, 1.7))
    assert drawings.box_around(torch.zeros(3, 2)) == (-1, 1, -1, 1)


def test_drawing_leaves_no_state_behind():
    # catches figures that pyplot keeps, and a backend that is chosen for the user
    import matplotlib.pyplot as plt

    before, backend = plt.get_fignums(), plt.get_backend()
    points = torch.randn(5, 2)
    pixels = drawings.rendered(drawings.draw_points(points, points, (-1, 1, -1, 1)))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (420, 800, 3))
    assert plt.get_fignums() == before
    assert plt.get_backend() == backend
