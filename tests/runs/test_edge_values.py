"""Whole runs with edge values that diffusers' scripts accept; all are in tests/config/test_values_of_diffusers.py."""

import pytest
from trainer import metrics, same, train, weights


@pytest.mark.filterwarnings("ignore:.*--(max_train_steps|learning_rate|snr_gamma)")
def test_a_run_of_no_steps_leaves_what_it_starts_from(sd_pipeline, image_folder, tmp_path):
    flags = {"max_train_steps": 0, "validation_prompt": "cat", "num_validation_images": 1, "validation_epochs": 0}
    out = train(sd_pipeline, image_folder, tmp_path / "out", **flags)
    assert metrics(out) == [] and same(weights(out), weights(sd_pipeline))
    assert [path.name for path in sorted((out / "samples").glob("step-*.png"))] == ["step-000000.png"]


@pytest.mark.filterwarnings("ignore:.*--(max_train_steps|learning_rate|snr_gamma)")
def test_zeros_and_negative_offsets(sd_pipeline, image_folder, tmp_path):
    flags = {"validation_prompt": "cat", "num_validation_images": 0, "learning_rate": 0, "snr_gamma": 0}
    flags |= {"noise_offset": -0.1, "input_perturbation": -0.1, "checkpointing_steps": 1, "checkpoints_total_limit": 0}
    out = train(sd_pipeline, image_folder, tmp_path / "out", **flags)
    assert all(record["diffusion_loss"] == 0 for record in metrics(out)) and len(metrics(out)) == 2
    assert not list((out / "samples").glob("*")) and [path.name for path in out.glob("checkpoint-*")] == [
        "checkpoint-2"
    ]


def test_validation_after_the_training_only(sd_pipeline, image_folder, tmp_path):
    flags = {"validation_prompt": "cat", "num_validation_images": 1, "validation_epochs": 0, "max_train_steps": 3}
    out = train(sd_pipeline, image_folder, tmp_path / "out", train_batch_size=4, **flags)
    names = [path.name for path in sorted((out / "samples").glob("step-*.png"))]
    assert names == ["step-000000.png", "step-000003.png"]
