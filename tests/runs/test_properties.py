"""Whatever is given, the answer is a result or a refusal, never another exception: properties and fuzzing.

Each has a short form of so many examples, the same each time, and with `-m slow` a long one: again and again so many,
drawn anew, for half a minute or for FUZZ_SECONDS. Coverage-guided, and without an end: tests/fuzz_images.py.
"""

import ast
import io
import json
import os
import random
import re
import time
import warnings
from contextlib import redirect_stderr

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from trainer import arguments, resolved
from trainer import settings as flags_of

from lpl.config import Config
from lpl.config.command_line import build_parser, recipe
from lpl.config.flag import boolean
from lpl.data.captions import Captions
from lpl.data.reading import RESAMPLING, lies_in, to_rgb
from lpl.evaluation import Preprocessing, folder_images
from lpl.publishing.card import write_model_card
from lpl.tools.pictures import labelled_grid
from tests.data.test_dataset import over
from tests.publishing.test_card import card


SECONDS = float(os.environ.get("FUZZ_SECONDS", "30"))  # of each long form
LONG = pytest.param("long", marks=pytest.mark.slow)


@pytest.fixture(params=["short", LONG])
def for_all(request):
    """`@for_all(count, *examples, name=strategy)` runs a property at once: on the examples, which are dicts of its
    arguments, and on so many that are drawn."""

    def decorator(count, *explicit, **strategies):
        def run(check):
            for values in explicit:
                check(**values)
            once = settings(
                max_examples=count,
                derandomize=request.param == "short",
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )(given(**strategies)(check))
            end, rounds = time.monotonic() + SECONDS, 0
            while not rounds or (request.param == "long" and time.monotonic() < end):
                once()
                rounds += 1
            print(f"{request.node.name}: {rounds * count} examples")

        return run

    return decorator


# Arguments -----------------------------------------------------------------------------------------------------------

ACTIONS = {
    action.dest: action for action in build_parser()._actions if action.dest not in ("help", "config", "without")
}
PATHS = ("output_dir", "logging_dir", "cache_dir")
WORDS = st.one_of(
    st.sampled_from(
        ["", "0", "1", "-1", "nan", "inf", "auto", "auto:0.2", "mid", "rgb", "a b", "\n", "\0", "--", "x" * 300]
    ),
    st.text(max_size=8),
)
INTEGERS = st.one_of(st.integers(-2, 12), st.integers(-(10**20), 10**20))
FLOATS = st.one_of(st.floats(0, 1), st.floats())


def words_for(action):
    """Words that may stand behind a flag, right ones more often."""
    right = {int: INTEGERS.map(str), float: FLOATS.map(repr), boolean: st.sampled_from(["true", "False"])}
    words = st.sampled_from(list(action.choices)).map(str) if action.choices else right.get(action.type, WORDS)
    return st.one_of(words, words, words, WORDS)


def given_flag(action):
    if action.nargs == 0:
        return st.just([f"--{action.dest}"])
    if action.nargs == "+":
        return st.lists(words_for(action), min_size=1, max_size=3).map(lambda words: [f"--{action.dest}", *words])
    return words_for(action).map(lambda word: [f"--{action.dest}={word}"])


FLAGS = st.lists(st.sampled_from(sorted(ACTIONS)), max_size=5, unique=True).flatmap(
    lambda names: st.tuples(*(given_flag(ACTIONS[name]) for name in names))
)


def checked(words):
    """Flags as the script knows them before it loads anything, or the sentence by which they are refused."""
    said = io.StringIO()
    try:
        with redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return resolved(words)[0]
    except ValueError as error:
        return str(error)
    except SystemExit as error:
        assert error.code == 2
        assert said.getvalue().count("\n") == 1, said.getvalue()
        return said.getvalue().partition("error: ")[2]


@pytest.fixture(scope="module")
def base(sd_pipeline, image_folder, tmp_path_factory):
    """A command that is accepted."""
    words = arguments(sd_pipeline, image_folder, tmp_path_factory.mktemp("runs") / "run", train_batch_size=None)
    assert isinstance(checked(words), Config)
    return words


def test_flags_are_accepted_or_refused_by_name(for_all, base):
    examples = (
        (["--lpl_num_blocks=10000000000000"],),
        (["--validation_prompt=x"], ["--num_validation_images=10000000000000"]),
        (["--ema_decay=--"], ["--validation_prompts=--"]),
        *(([f"--{name}={300 * 'x'}"],) for name in ("train_data_dir", "output_dir", "resume_from_checkpoint")),
    )

    @for_all(150, *({"flags": flags} for flags in examples), flags=FLAGS)
    def _(flags):
        answer = checked([*base, *(word for words in flags for word in words)])
        if isinstance(answer, str):
            assert re.search(r"--[a-z]", answer), answer


def test_a_recipe_stands_for_the_same_flags(for_all, base, tmp_path):
    path = tmp_path / "recipe.yaml"

    @for_all(50, flags=FLAGS)
    def _(flags):
        args = checked([*base, *(word for words in flags for word in words)])
        assume(isinstance(args, Config))
        values = recipe(args)
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        again = checked(["--config", str(path)])
        assert isinstance(again, Config), again
        assert json.dumps(recipe(again)) == json.dumps(values)  # not ==, since NaN is not NaN


PLAIN = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, st.text(max_size=8), st.dates(), st.binary(max_size=3))
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=2), max_leaves=6
)
ENTRIES = st.dictionaries(st.sampled_from(sorted(ACTIONS)) | PLAIN, VALUES, max_size=4)


YAML = st.text("abc:-[]{}&*!|>?,#'\"% \n\t0=.", max_size=40)


def test_any_yaml_is_accepted_or_refused(for_all, base, tmp_path):
    path = tmp_path / "recipe.yaml"

    @for_all(150, text=ENTRIES.map(yaml.safe_dump) | YAML | st.binary(max_size=30))
    def _(text):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        answer = checked([*base, "--config", str(path)])
        if isinstance(answer, str):
            assert re.search(r"--[a-z]", answer), answer


def test_any_index_of_a_pipeline_is_accepted_or_refused(for_all, base, sd_pipeline, tmp_path):
    index = json.loads((sd_pipeline / "model_index.json").read_text())
    for part in ("unet", "vae", "scheduler"):
        (tmp_path / part).symlink_to(sd_pipeline / part)
    names = st.sampled_from(["unet", "vae", "scheduler", "_class_name", "new"])

    @for_all(60, changes=st.dictionaries(names, VALUES, min_size=1))
    def _(changes):
        (tmp_path / "model_index.json").write_text(json.dumps(index | changes, default=str, skipkeys=True))
        checked([*base, "--pretrained_model_name_or_path", str(tmp_path)])


# Captions ------------------------------------------------------------------------------------------------------------

ANYTHING = st.one_of(PLAIN, st.lists(PLAIN, max_size=3), st.tuples(st.text(), st.text()), st.just(np.array(["a"])))


def test_a_caption_is_a_string_or_refused(for_all):
    @for_all(200, caption=ANYTHING, choice=st.floats(0, 1, exclude_max=True))
    def _(caption, choice):
        try:
            chosen = Captions("text").caption({"text": caption}, choice)
        except ValueError as error:
            assert "--caption_column" in str(error)
        else:
            assert isinstance(chosen, str) and (chosen == caption or chosen in caption)


TEXT = st.text(max_size=30) | st.text(st.characters(), max_size=10)  # the latter with what UTF-8 cannot hold


def test_a_card_holds_any_prompt(for_all, tmp_path):
    examples = (
        {"prompt": '"""\n```\n---\n', "classes": {}, "rank": False},
        {"prompt": "\\", "classes": {0: "|"}, "rank": True},
    )
    classes = st.dictionaries(st.integers(0, 9), TEXT, max_size=3)

    @for_all(60, *examples, prompt=TEXT | st.integers(0, 999), classes=classes, rank=st.booleans())
    def _(prompt, classes, rank):
        command = ["train.py", "--validation_prompts", str(prompt), "--resolution", "64"]
        described = card(prompt=prompt, classes=classes, lora_rank=4 if rank else None, command=command)
        text = write_model_card(tmp_path, described).read_text(encoding="utf-8")
        assert ModelCard(text).data.library_name == "diffusers"
        (code,) = re.findall(r"(?ms)^(`{3,})python\n(.*?)\n\1$", text)
        values = [node.value for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Constant)]
        assert (prompt if isinstance(prompt, int) else prompt.encode(errors="replace").decode()) in values


def test_a_grid_shows_any_caption(for_all):
    @for_all(30, caption=TEXT, label=TEXT)
    def _(caption, label):
        assert labelled_grid({label: [Image.new("RGB", (8, 8))]}, [caption]).mode == "RGB"


# Paths ---------------------------------------------------------------------------------------------------------------

PARTS = st.sampled_from(["..", ".", "data", "sub", "out", "loop", "a.png", "", "zip:", "::", "hf:"])


def test_what_lies_in_a_folder_is_there(for_all, tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "out").symlink_to(tmp_path)
    (folder / "data").symlink_to(folder)
    (folder / "loop").symlink_to("loop")

    @for_all(200, parts=st.lists(PARTS, max_size=7))
    def _(parts):
        for path in (os.path.join(folder, *parts), "/".join(parts)):
            if lies_in(path, str(folder)) and not path.startswith("zip://"):
                there, where = os.path.realpath(path), os.path.realpath(folder)
                assert os.path.commonpath([there, where]) == where


# Images --------------------------------------------------------------------------------------------------------------

MODES = (
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
    "I;16",
)
ORIENTATION = 274  # of EXIF


def picture(mode, width, height, seed=0):
    """Noise in any of PIL's modes."""
    draw = np.random.default_rng(seed)
    if mode == "F":
        return Image.fromarray(draw.choice([0, 1e-30, 0.5, 1], (height, width)).astype(np.float32))
    if mode in ("I", "I;16"):
        kind = np.int32 if mode == "I" else np.uint16
        return Image.fromarray(draw.integers(0, 2**16, (height, width)).astype(kind))
    bands = len(Image.new(mode, (1, 1)).getbands())
    return (
        Image.frombytes(mode, (width, height), draw.bytes(width * height * bands))
        if mode != "1"
        else Image.new("1", (width, height), 1)
    )


def samples_of(*rows, **changes):
    return over(list(rows), flags_of(**changes))


PICTURES = {
    "mode": st.sampled_from(MODES),
    "size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "orientation": st.integers(0, 10),
    "resolution": st.integers(1, 24),
    "epoch": st.integers(0, 10**6),
    "how": st.sampled_from(sorted(RESAMPLING)),
    "flip": st.booleans(),
    "center": st.booleans(),
}
LONG_PICTURES = (
    ("RGB", (1, 2000), 6, 8, 3, "lanczos", True, False),
    ("L", (5000, 2), 1, 9, 4, "bicubic", False, False),
)


def test_any_image_becomes_pixels(for_all):
    for_all(150, *(dict(zip(PICTURES, values)) for values in LONG_PICTURES), **PICTURES)(becomes_pixels)


def becomes_pixels(mode, size, orientation, resolution, epoch, how, flip, center):
    image = picture(mode, *size)
    image.getexif()[ORIENTATION] = orientation
    upright = size[::-1] if orientation in (5, 6, 7, 8) else size
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", upright)
    changes = {"resolution": resolution, "image_interpolation_mode": how, "random_flip": flip, "center_crop": center}
    sample = samples_of({"image": image, "text": "x"}, **changes)[epoch, 0]
    assert sample["bad"] == [] and sample["pixels"].shape == (3, resolution, resolution)
    assert sample["pixels"].isfinite().all() and sample["pixels"].abs().max() <= 1
    assert sample["original_size"].tolist() == list(upright[::-1])
    scale = resolution / min(upright)
    for start, length in zip(sample["crop_top_left"].tolist(), upright[::-1]):
        assert 0 <= start <= max(0, round(length * scale) - resolution)


def encoded(kind, **options):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))
    if kind == "GIF":
        image = image.convert("P")
        options |= {"save_all": True, "append_images": [image], "transparency": 3}
    image.getexif()[ORIENTATION] = 6
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {
    "PNG": encoded("PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "JPEG": encoded("JPEG", progressive=True),
    "WEBP": encoded("WEBP"),
    "GIF": encoded("GIF"),
    "TIFF": encoded("TIFF", compression="tiff_lzw"),
    "TIFF raw": encoded("TIFF"),
    "BMP": encoded("BMP"),
}


def mutated(content, draw):
    """The file with a few of its bytes changed, dropped, doubled, or its end cut off."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(content) + 1)
        length = draw.choice([1, 1, 1, 2, 4, 16])
        match draw.randrange(6):
            case 0 | 1:
                content[place : place + length] = draw.randbytes(length)
            case 2:
                del content[place : place + length]
            case 3:
                content[place:place] = content[place : place + length]
            case 4:
                content[place : place + 1] = bytes([draw.choice([0, 1, 127, 128, 255])])
            case 5 if draw.random() < 0.3:
                del content[place:]
    return bytes(content)


def is_read(content, seed=0, place=(0, 0)):
    """Whether a file gives pixels; if not, it is a bad sample, and the next one gives them."""
    row = {"image": {"bytes": content, "path": None}, "text": "fuzzed"}
    good = {"image": Image.new("RGB", (9, 9)), "text": "the next one"}
    sample = samples_of(row, good, resolution=8, seed=seed)[place]
    assert sample["pixels"].shape == (3, 8, 8) and sample["pixels"].isfinite().all(), content
    assert sample["pixels"].abs().max() <= 1, content
    if sample["bad"]:
        ((bad, reason),) = sample["bad"]
        assert bad == 0 and reason and sample["caption"] == "the next one", content
    return not sample["bad"]


@pytest.fixture
def small_bombs(monkeypatch):
    """What a broken head claims is allocated before it is found out."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("form", ["short", LONG])
def test_a_broken_file_gives_pixels_or_a_bad_sample(form, kind, small_bombs):
    draw, end = random.Random(kind if form == "short" else None), time.monotonic() + SECONDS
    read = []
    while len(read) < 150 or (form == "long" and time.monotonic() < end):
        content = mutated(FILES[kind], draw)
        read.append(is_read(content, draw.randrange(9), (draw.randrange(99), 0)))
    print(f"{kind}: {len(read)} files, {sum(read)} read")
    assert 5 < sum(read) < len(read) - 5


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_ends_anywhere_gives_pixels_or_a_bad_sample(kind, small_bombs):
    content = FILES[kind]
    for end in range(0, len(content), max(1, len(content) // 60)):
        assert not is_read(content[:end]) or end > len(content) // 2


LINES = st.lists(VALUES.map(lambda value: json.dumps(value, default=str, skipkeys=True)) | TEXT, max_size=4)


def test_any_metadata_is_read_or_refused(for_all, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    file = tmp_path / "metadata.jsonl"

    @for_all(60, {"lines": ["[" * 10_000]}, {"lines": ['{"file_name": "\\u0000"}']}, lines=LINES)
    def _(lines):
        lines = ['{"file_name": "a.png", "text": "a"}', *lines]
        file.write_text("\n".join(lines), encoding="utf-8", errors="replace")
        try:
            assert len(folder_images(tmp_path, Preprocessing(8), progress=False)) == 1
        except ValueError as error:
            assert str(tmp_path) in str(error)
