"""python -m lpl.distill: pairs, the fit, the command, and a training with the student that it makes."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_vae
from trainer import arguments, metrics, resolved, same, train, weights

from benchmarks import student_sizes
from lpl.config.groups import Lpl
from lpl.diagnosis.dry_run import Cost, Report
from lpl.distillation import command
from lpl.distillation import fit as fits
from lpl.distillation.fit import Schedule, fit
from lpl.distillation.pairs import KINDS, Pairs
from lpl.student import Student
from lpl.tools.files import entries
from tests.publishing.conftest import TOKEN, hub  # noqa: F401


SMALL = [
    "--num_pairs",
    "80",
    "--steps",
    "6",
    "--measure_steps",
    "2",
    "--width",
    "8",
    "--depth",
    "1",
    "--batch_size",
    "8",
]
SMALL += ["--resolution", "32", "--lpl_threshold_base_resolution", "0", "--device", "cpu"]


def words(model, images, folder, *more):
    place = [
        "--pretrained_model_name_or_path",
        str(model),
        "--train_data_dir",
        str(images),
        "--output_dir",
        str(folder),
    ]
    return [*place, "--cache_dir", str(images.with_name("cache")), *SMALL, *more]


@pytest.fixture(scope="module")
def made(sd_pipeline, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled") / "student"
    command.main(words(sd_pipeline, image_folder, folder))
    return folder


def test_it_leaves_a_student_its_card_and_its_numbers(made):
    assert {"config.json", "diffusion_pytorch_model.safetensors", "README.md", "fidelity.png"} < {
        path.name for path in made.iterdir()
    }
    numbers = json.loads((made / "distill.json").read_text())
    assert numbers["held_out"] == 10 and numbers["pairs_from"] == "predictions"  # the 8th of 8 images
    assert numbers["cost"]["operations"] > 0 and -1 <= numbers["cosine"] <= 1
    student = Student.from_pretrained(made)
    assert student.config.loss["normalization"] == "shared"
    assert student.config.fidelity["cosine"] == numbers["cosine"]
    assert f"{numbers['cosine']:.3f}" in (made / "README.md").read_text()


def test_an_interrupted_command_continues_to_the_same_student(made, sd_pipeline, image_folder, tmp_path, monkeypatch):
    """It ends among the pairs, then after the second measurement of the fit."""
    save, left = command.prepare.__globals__["write_whole"], []

    def killed(path, write):
        if left:
            raise KeyboardInterrupt
        left.append(path)
        return save(path, write)

    monkeypatch.setitem(command.prepare.__globals__, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main(words(sd_pipeline, image_folder, tmp_path / "s"))
    monkeypatch.undo()
    shards = list((tmp_path / "s/pairs").glob("*.safetensors"))
    assert len(shards) == 1
    rate = Schedule.rate

    def stopped(schedule, step):
        if step == 3:
            raise KeyboardInterrupt
        return rate(schedule, step)

    monkeypatch.setattr(Schedule, "rate", stopped)
    with pytest.raises(KeyboardInterrupt):
        command.main(words(sd_pipeline, image_folder, tmp_path / "s"))
    monkeypatch.undo()
    assert [entry["step"] for entry in entries(tmp_path / "s/fit.jsonl")] == [0, 2]
    command.main(words(sd_pipeline, image_folder, tmp_path / "s"))
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "s" / name).read_bytes() == (made / name).read_bytes()


def test_other_settings_in_the_same_folder_are_refused(made, sd_pipeline, image_folder, capsys):
    with pytest.raises(SystemExit, match="made with seed 0, and now it is 1"):
        command.main(words(sd_pipeline, image_folder, made, "--seed", "1"))


@pytest.mark.parametrize(
    "more, said",
    [
        (["--width", "12"], "--width 12: it must be a multiple of 8"),
        (["--steps", "0"], "--steps 0: it must be more than 0"),
        (["--max_train_samples", "4"], "4 images, but 8 or more are needed"),
        (["--lpl_blocks", "up_9"], "--lpl_blocks up_9: there is no up_9"),
        (["--train_data_dir", "no/such"], "--train_data_dir no/such: "),
        (["--mixed_precision", "fp16"], "--mixed_precision fp16 needs a GPU"),
    ],
)
def test_wrong_flags_are_refused(more, said, sd_pipeline, image_folder, tmp_path):
    with pytest.raises(SystemExit) as left:
        command.main(words(sd_pipeline, image_folder, tmp_path / "s", *more))
    assert said in str(left.value.code) and not (tmp_path / "s").exists()


def test_a_vae_alone_needs_no_captions(sd_pipeline, image_folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for file in image_folder.iterdir():
        if file.suffix in (".png", ".jpg", ".webp"):
            (images / file.name).write_bytes(file.read_bytes())
    command.main(words(sd_pipeline / "vae", images, tmp_path / "s", "--num_pairs", "16", "--steps", "2"))
    numbers = json.loads((tmp_path / "s/distill.json").read_text())
    assert numbers["pairs_from"] == "errors" and math.isfinite(numbers["relative_error"])


def test_a_width_follows_from_the_decoders_widest_block():
    """Not from the weights, of which those of attention have three times the channels."""
    assert command.default_width(tiny_vae("sd", block_out_channels=[32, 320], norm_num_groups=32)) == 160
    assert command.default_width(tiny_vae("wan", base_dim=128)) == 128
    assert command.default_width(tiny_vae("cosmos")) == 96


def test_kinds_of_errors_differ():
    latents, other = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    errors = [kind(latents, other, torch.Generator().manual_seed(1)) for kind in KINDS]
    assert all(error.shape == latents.shape and error.any() for error in errors)
    assert len({round(error.std().item(), 4) for error in errors}) == len(KINDS)


def test_a_student_learns_the_gradient_of_another(tmp_path, monkeypatch):
    """LPL is a student here, so that its gradient can be learnt in a few steps."""
    torch.manual_seed(0)
    teacher = Student(4, width=8, depth=1)
    latents = torch.randn(64, 4, 8, 8)
    predicted = (latents + 0.2 * torch.randn_like(latents)).requires_grad_()
    value = teacher.terms(predicted, latents).sum(0)
    (gradient,) = torch.autograd.grad(value.sum(), predicted)
    pairs = Pairs(latents, predicted.detach(), value.detach(), gradient, torch.zeros(64), torch.arange(64))
    schedule = Schedule(60, 16, 5e-3, 0, 20, 16, 1)
    fit(Student(4, 16, 1), *pairs.split(), schedule, tmp_path, torch.device("cpu"))
    log = entries(tmp_path / "fit.jsonl")
    assert log[-1]["step"] == 60 and log[-1]["relative_error"] < 0.7 * log[0]["relative_error"]
    assert log[-1]["cosine"] > log[0]["cosine"]
    student, gradients = Student(4, 16, 1), []
    for at_a_time in (64, 5):
        monkeypatch.setattr(fits, "ROOM", at_a_time * fits.BYTES * 16 * 8 * 8)
        student.zero_grad()
        fits.backward(student, pairs, torch.device("cpu"))
        gradients.append(torch.cat([weight.grad.flatten() for weight in student.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


# In training ---------------------------------------------------------------------------------------------------------


RUN = {"max_train_steps": 5, "lpl_measuring_steps": 1, "checkpointing_steps": 3, "lpl_correct_every": 2}


@pytest.fixture(scope="module")
def trained(made, sd_pipeline, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with") / "run"
    return train(sd_pipeline, image_folder, folder, lpl_student=made, lpl_sigma_threshold=1e6, **RUN)


def test_the_log_tells_how_faithful_the_student_is(trained, caplog):
    log = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    corrected = [entry["step"] for entry in log if "student_cosine" in entry]
    assert corrected == [1, 3, 5]  # while w is measured, then on every 2nd step
    assert {"lpl/student_0", "lpl/student_1"} < log[1].keys() and log[1]["lpl"] > 0


def test_the_weight_is_measured_on_lpl_itself(trained, sd_pipeline, image_folder, tmp_path):
    plain = {name: RUN[name] for name in RUN if name != "lpl_correct_every"} | {"max_train_steps": 1}
    alone = train(sd_pipeline, image_folder, tmp_path / "run", lpl_sigma_threshold=1e6, **plain)
    assert metrics(alone, "lpl")[0] == pytest.approx(metrics(trained, "lpl")[0][:1], rel=1e-4)


def test_a_resumed_run_with_a_student_equals_the_uninterrupted_one(trained, made, sd_pipeline, image_folder, tmp_path):
    flags = RUN | {"lpl_student": made, "lpl_sigma_threshold": 1e6}
    folder = train(sd_pipeline, image_folder, tmp_path / "run", **flags | {"max_train_steps": 3})
    train(sd_pipeline, image_folder, folder, resume_from_checkpoint="latest", **flags)
    assert same(weights(folder), weights(trained))


def test_a_student_of_another_loss_is_refused(made, sd_pipeline, image_folder, tmp_path):
    with pytest.raises(SystemExit, match="made for normalization shared .* change --lpl_normalization"):
        train(sd_pipeline, image_folder, tmp_path, lpl_student=made, lpl_normalization="none", max_train_steps=1)


def test_a_student_that_does_not_fit_is_warned_of(trained, made, sd_pipeline, image_folder, tmp_path, caplog):
    folder = train(sd_pipeline, image_folder, tmp_path, lpl_student=made, lpl_sigma_threshold=1e6, max_train_steps=1)
    (record,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    warned = "python -m lpl.distill" in caplog.text
    pull = record.get("student_pull", 1.0)
    assert warned == (record["student_cosine"] < 0.8 or pull < 0.8 or record["student_error"] > 1.0)


def test_a_student_made_at_another_resolution_is_warned_of(made, sd_pipeline, image_folder, tmp_path, recwarn):
    resolved(arguments(sd_pipeline, image_folder, tmp_path / "run", lpl_student=made, resolution=64))
    assert any("made from images of 32 px, and the run's have 64 px" in str(warning.message) for warning in recwarn)


def test_a_dry_run_tells_what_the_student_costs(made, sd_pipeline, image_folder, tmp_path, capsys):
    train(sd_pipeline, image_folder, tmp_path / "run", lpl_student=made, dry_run=True)
    assert "with the student" in capsys.readouterr().out


def test_a_dry_run_counts_the_corrections():
    costs = Cost(1.0, 100, 0.5), Cost(5.0, 300, 0.5), Cost(1.2, 110, 0.5)
    plan = SimpleNamespace(config=SimpleNamespace(lpl=Lpl(lpl_student="student", lpl_correct_every=4)))
    cost = Report(plan, None, None, *costs)._lpl_cost()
    assert (cost.seconds, cost.memory) == (pytest.approx(1.2 + (5.0 - 1.2) / 4), 300)
    plan.config.lpl = Lpl(lpl_student="student")
    assert Report(plan, None, None, *costs)._lpl_cost() == costs[2]


# What others see -----------------------------------------------------------------------------------------------------


def test_neither_pairs_nor_local_paths_are_published(hub, made, trained, sd_pipeline, image_folder):  # noqa: F811
    """The pairs hold the images' latents, which the VAE decodes. The same command publishes what it has made."""
    more = ("--push_to_hub", "--hub_model_id", "user/student", "--hub_token", TOKEN)
    command.main(words(sd_pipeline, image_folder, made, *more))
    files = hub.repos["user/student"].files
    assert (made / "pairs").is_dir() and files.keys() - {".gitattributes"} == set(command.PUBLISHED)
    texts = [files[name].decode() for name in ("config.json", "distill.json", "README.md")]
    card = (trained / "README.md").read_text()
    assert not any(str(made.parent) in text or str(image_folder.parent) in text for text in (*texts, card))
    assert "student_0" not in card and "--lpl_student path/to/student" in card


def test_a_hub_that_cannot_be_written_to_is_told_of_first(hub, sd_pipeline, image_folder, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit, match="--hub_token"):
        command.main(words(sd_pipeline, image_folder, tmp_path / "s", "--push_to_hub", "--hub_token", "hf_wrong"))
    assert not (tmp_path / "s").exists()


def test_another_schedule_is_refused(made, sd_pipeline, image_folder):
    with pytest.raises(SystemExit, match="trained with --steps 6, and now it is 8"):
        command.main(words(sd_pipeline, image_folder, made, "--steps", "8"))


def test_a_threshold_with_nothing_inside_is_refused(sd_pipeline, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lpl.distillation.pairs.DRAWS", 20)
    with pytest.raises(SystemExit, match="none is inside"):
        command.main(words(sd_pipeline, image_folder, tmp_path / "s", "--lpl_sigma_threshold", "1e-9"))


def test_pairs_do_not_depend_on_the_batch(sd_pipeline, image_folder, tmp_path):
    found = []
    for size in ("1", "5"):
        more = ("--num_pairs", "16", "--steps", "1", "--pairs_from", "errors", "--decode_batch_size", size)
        command.main(words(sd_pipeline, image_folder, tmp_path / size, *more))
        (shard,) = (tmp_path / size / "pairs").glob("*.safetensors")
        found.append(load_file(shard)["predicted"])
    assert torch.allclose(*found, atol=1e-5)


def test_a_recipe_has_the_model_the_loss_and_the_precision(sd_pipeline, image_folder, tmp_path):
    """Its run takes the student; what it says of the run itself, such as where it publishes, is left aside."""
    recipe, student = tmp_path / "recipe.yaml", tmp_path / "student"
    said = {"pretrained_model_name_or_path": str(sd_pipeline), "mixed_precision": "bf16", "resolution": 32}
    said |= {"lpl_blocks": ["mid", "up_0"], "lpl_gradient_checkpointing": True, "push_to_hub": True, "rank": 4}
    recipe.write_text(json.dumps(said))
    data = ["--train_data_dir", str(image_folder), "--cache_dir", str(tmp_path / "cache"), *SMALL, "--num_pairs", "16"]
    command.main(["--config", str(recipe), "--output_dir", str(student), *data])
    pairs = {}
    for precision in ("bf16", "no"):
        own = ["--lpl_blocks", "mid", "up_0", "--num_pairs", "16", "--mixed_precision", precision]
        command.main(words(sd_pipeline, image_folder, tmp_path / precision, *own))
    for folder in (student, tmp_path / "bf16", tmp_path / "no"):
        (shard,) = (folder / "pairs").glob("*.safetensors")
        pairs[folder.name] = load_file(shard)
    assert same(pairs["student"], pairs["bf16"])
    exact, rounded = pairs["no"], pairs["bf16"]
    for name in ("predicted", "gradient"):
        assert not torch.equal(exact[name], rounded[name])
        assert (exact[name] - rounded[name]).norm() < 0.05 * exact[name].norm()
    train(
        sd_pipeline,
        image_folder,
        tmp_path / "run",
        lpl_blocks=["mid", "up_0"],
        lpl_student=str(student),
        max_train_steps=1,
    )


def test_a_model_is_asked_for(image_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        command.main(["--train_data_dir", str(image_folder), "--output_dir", str(tmp_path / "s")])
    assert "--pretrained_model_name_or_path is missing" in str(left.value.code)


def test_students_of_several_sizes_share_their_pairs(made, sd_pipeline, image_folder, tmp_path):
    """benchmarks/student_sizes.py; a size that is there is not made again."""
    own = ["--pairs", str(made), "--output_dir", str(tmp_path / "sizes"), "--results", str(tmp_path / "sizes.json")]
    line = [*own, "--steps", "2", "--sizes", "8x1", "16x2", "--", *words(sd_pipeline, image_folder, tmp_path)]
    student_sizes.main(line)
    found = json.loads((tmp_path / "sizes.json").read_text())
    small, large = found["8x1"], found["16x2"]
    assert (small["width"], small["depth"], small["pairs"]) == (8, 1, 80) and (large["width"], large["depth"]) == (
        16,
        2,
    )
    assert small["cost"]["parameters"] < large["cost"]["parameters"]
    assert list(small["relative_error_by_step"]) == ["0", "2"]
    assert small["steps"] == 2
    before = (tmp_path / "sizes/8x1/distill.json").stat().st_mtime_ns
    student_sizes.main([word for word in line if word != "16x2"])
    assert (tmp_path / "sizes/8x1/distill.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "sizes.json").read_text()) == found  # the other size stays
    with pytest.raises(ValueError, match="has a student of 2 steps; give --steps 2"):
        student_sizes.main(["3" if word == "2" else word for word in line])
