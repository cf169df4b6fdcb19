import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lpl.tools.pictures import (
    PANELS,
    _break,
    _curve,
    _extent,
    _font,
    _running_mean,
    labelled_grid,
    loss_curves,
    save_picture,
)


def picture(width: int = 64, height: int = 64, colour="teal", mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (width, height), colour).convert(mode)


def has_ink(image: Image.Image, box: tuple[int, int, int, int]) -> bool:
    return np.asarray(image.crop(box).convert("L")).min() < 128


def records(steps: int = 200, **constant: float) -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    return [{"step": step, "diffusion_loss": 0.1 + 0.01 * rng.normal(), **constant} for step in range(1, steps + 1)]


# The grid


@pytest.mark.parametrize("side, tile", [(16, 128), (64, 128), (96, 192), (100, 200), (128, 128), (300, 300)])
def test_small_samples_are_enlarged_by_a_whole_number(side, tile):
    checks = Image.fromarray(np.indices((side, side)).sum(0).astype(np.uint8) % 2 * 255)
    grid = np.asarray(labelled_grid({"": [checks]}, [""]))
    drawn = np.argwhere((grid == 0).all(-1))
    factor = tile // side
    assert (drawn.max(0) - drawn.min(0) + 1).tolist() == [tile, tile]
    assert np.isin(grid, [0, 255]).all()  # hard pixels: nothing between black and white
    assert len(drawn) == (side * side // 2) * factor**2


def test_labels_and_captions_are_drawn_in_white_margins():
    grid = labelled_grid({"before": [picture(), picture()], "after": [picture(), picture()]}, ["a cat", "a dog"])
    bare = labelled_grid({"": [picture(), picture()], " ": [picture(), picture()]}, ["", ""])
    left, above = grid.width - bare.width, grid.height - bare.height
    assert left > 0 and above > 0
    assert has_ink(grid, (0, above, left, grid.height // 2)) and has_ink(
        grid, (0, grid.height // 2, left, grid.height)
    )
    assert has_ink(grid, (left, 0, grid.width // 2, above)) and has_ink(
        grid, (grid.width * 3 // 4, 0, grid.width, above)
    )
    edges = np.asarray(grid)
    assert all((edge == 255).all() for edge in (edges[:3], edges[-3:], edges[:, :3], edges[:, -3:]))


def test_different_captions_give_different_pictures():
    one, other = (labelled_grid({"row": [picture()]}, [caption]) for caption in ("a fox", "a fax"))
    assert one.size == other.size and one.tobytes() != other.tobytes()


def test_sizes_and_shapes_may_differ_and_rows_may_be_short():
    rows = {"real": [picture(120, 60), picture(60, 120), picture(31, 17)], "drawn": [picture(300, 300)]}
    grid = np.asarray(labelled_grid(rows, ["wide", "high", "small"], tile=150))
    teal = (grid == np.array([0, 128, 128])).all(-1)
    columns = np.flatnonzero(teal.any(0))
    assert teal.sum() == 150 * 75 + 75 * 150 + 150 * 82 + 150 * 150
    assert columns.max() - columns.min() < 3 * 150 + 40


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK", "I", "F"])
def test_any_mode(mode):
    assert labelled_grid({"row": [picture(mode=mode)]}, ["caption"]).mode == "RGB"


def test_what_is_transparent_shows_the_paper():
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert np.asarray(labelled_grid({"": [image]}, [""])).min() == 255


@pytest.mark.parametrize(
    "caption",
    [
        "一只红色的狐狸坐在山顶上看日落" * 4,
        "🦊🌄👩‍🚀 fox",
        "кот на крыше",
        "ثعلب أحمر",
        "two\nlines\tand a tab",
        "w" * 300,
        "",
        "\ud800\x00",
    ],
)
def test_captions_in_any_script(caption):
    grid = labelled_grid({caption: [picture()]}, [caption])
    assert grid.width < 400 and grid.height < 400


def test_long_captions_are_cut():
    word = labelled_grid({"row": [picture()]}, ["word"])
    long = labelled_grid({"row": [picture()]}, ["a photograph of many things " * 40])
    assert word.height < long.height < word.height + 8 * 17


def test_lines_keep_to_their_width():
    font = _font(14, wide=False)
    lines = _break("a photograph of an incomprehensibilitiesincomprehensibilities cat", font, 90)
    assert _extent(lines, font, 14)[0] <= 91 and "".join(lines).replace(" ", "").startswith("aphotographofanincomp")


@pytest.mark.parametrize("rows, captions", [({}, []), ({"row": []}, []), ({"row": [picture(), picture()]}, ["one"])])
def test_a_grid_without_images_or_captions_is_refused(rows, captions):
    with pytest.raises(ValueError, match="image"):
        labelled_grid(rows, captions)


# The curves


@pytest.mark.parametrize(
    "given, panels",
    [
        (records(), 1),
        (records(lr=1e-4), 2),
        (records(lr=1e-4, lpl=0.5, lpl_share=0.2), 4),
        (records(1, lr=0.0, lpl=None, lpl_share=float("nan")), 2),
        ([{"step": 3, "lpl": 2.0}, {"lpl": 1.0}, {"step": 4}], 1),
    ],
)
def test_panels_without_values_are_left_out(given, panels, tmp_path):
    path = loss_curves(given, tmp_path / "deep" / "loss_curves.png")
    assert sum(len(_curve(given, panel.key)[0]) > 0 for panel in PANELS) == panels
    assert Image.open(path).size == ((660, 384), (1320, 384), None, (1320, 768))[panels - 1]


@pytest.mark.parametrize("given", [[], [{"step": 1}], [{"step": 1, "diffusion_loss": float("inf")}]])
def test_nothing_to_draw_writes_nothing(given, tmp_path):
    assert loss_curves(given, tmp_path / "loss_curves.png") is None
    assert not list(tmp_path.iterdir())


def test_a_step_done_twice_counts_once_and_order_does_not_matter():
    given = [{"step": 2, "lpl": 5.0}, {"step": 1, "lpl": 1.0}, {"step": 2, "lpl": 2.0}]
    steps, values = _curve(given, "lpl", 100.0)
    assert steps.tolist() == [1, 2] and values.tolist() == [100.0, 200.0]


def test_the_running_mean_follows_and_is_not_dragged_by_a_spike():
    values = np.linspace(1.0, 2.0, 400)
    assert np.abs(_running_mean(values)[20:-20] - values[20:-20]).max() < 1e-9
    values[200] = 1e6
    assert _running_mean(values).max() < 2.1


def test_losses_over_decades_and_spikes_are_drawn(tmp_path):
    given = [{"step": s, "diffusion_loss": 10.0 ** (-s / 50), "lpl": 0.0} for s in range(1, 200)]
    assert loss_curves(given, tmp_path / "curves.png").stat().st_size > 5_000


def drawn(given, path, monkeypatch):
    """{title: axes} of the panels."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, format: figures.append(self) or file.touch())
    loss_curves(given, path)
    return {axes.get_title(loc="left"): axes for axes in figures[0].axes}


def legend(axes):
    return [] if axes.get_legend() is None else [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("steps", [3, 200])
def test_what_is_held_out_is_drawn_beside(steps, tmp_path, monkeypatch):
    given = records(steps, lpl=0.5, lr=1e-4)
    given += [{"step": step, "validation_loss": 0.3 - 0.001 * step, "validation_lpl": 2.0} for step in (0, 3)]
    panels = drawn(given, tmp_path / "curves.png", monkeypatch)
    assert list(panels) == ["Diffusion loss", "Latent perceptual loss", "Learning rate"]
    for title, values in (("Diffusion loss", [0.3, 0.297]), ("Latent perceptual loss", [2.0, 2.0])):
        axes = panels[title]
        assert legend(axes) == ["training", "validation"]
        line = next(line for line in axes.lines if line.get_label() == "validation")
        assert line.get_xdata().tolist() == [0, 3] and line.get_ydata().tolist() == pytest.approx(values)
        low, high = axes.get_ylim()
        assert low < min(values) and max(values) < high  # the range follows
    assert legend(panels["Learning rate"]) == []


def test_nothing_held_out_is_as_before(tmp_path, monkeypatch):
    panels = drawn(records(lpl=0.5), tmp_path / "curves.png", monkeypatch)
    assert all(legend(axes) == [] for axes in panels.values())
    assert [len(axes.lines) for axes in panels.values()] == [2, 2]  # the values and their mean
    assert panels["Diffusion loss"].get_ylim()[1] < 0.15


def test_what_is_held_out_alone_is_drawn_too(tmp_path, monkeypatch):
    panels = drawn([{"step": 0, "validation_loss": 0.3}], tmp_path / "curves.png", monkeypatch)
    assert list(panels) == ["Diffusion loss"] and legend(panels["Diffusion loss"]) == ["validation"]


def test_the_global_pyplot_state_is_left_alone(tmp_path):
    import matplotlib.pyplot as plt

    backend, figures = plt.get_backend(), plt.get_fignums()
    loss_curves(records(), tmp_path / "curves.png")
    assert (plt.get_backend(), plt.get_fignums()) == (backend, figures)


# Files


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = save_picture(picture(), tmp_path / "samples" / "grid.png")
    before = path.read_bytes()

    def break_off(self, file, **_options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(OSError, match="disk full"):
        save_picture(picture(colour="red"), path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["grid.png"]
