"""Edge values of the flags that diffusers' scripts have: what those train with is accepted here, or refused in words.

A script of diffusers ends in a traceback, or trains on nonsense, for the values that are refused.
"""

import warnings

import pytest
from commands import refusal
from trainer import arguments, parsed

from tests.config.test_command_line import FLAGS


DDPM, FLOW, LORA = "sd_pipeline", "sd3_pipeline", {"rank": 4}
PROMPT, RANGE = {"validation_prompt": "cat"}, {"timestep_bias_strategy": "range"}
COSINE = {"lr_scheduler": "cosine"}

ACCEPTED = [  # flag, values, the flags that it needs, the pipeline
    ("adam_beta1", [0], {}, DDPM),
    ("adam_beta2", [0], {}, DDPM),
    ("adam_epsilon", ["1e-12"], {}, DDPM),
    ("adam_weight_decay", [0], {}, DDPM),
    ("adam_weight_decay_text_encoder", [0], {"train_text_encoder": True}, DDPM),
    ("checkpoints_total_limit", [0, 1], {}, DDPM),
    ("checkpointing_steps", [1, 10**9], {}, DDPM),
    ("dataloader_num_workers", [0, 1], {}, DDPM),
    ("dream_detail_preservation", [0], {"dream_training": True}, DDPM),
    ("gradient_accumulation_steps", [1], {}, DDPM),
    ("image_interpolation_mode", ["nearest", "nearest_exact", "bicubic", "box", "hamming"], {}, DDPM),
    ("input_perturbation", [0, -0.1], {}, DDPM),
    ("learning_rate", [0, "1e-4", 1], {}, DDPM),
    ("logit_mean", [-1], {}, FLOW),
    ("logit_std", [0], {}, FLOW),
    ("lr_num_cycles", [1], {"lr_scheduler": "cosine_with_restarts"}, DDPM),
    ("lr_power", [0, -1], {"lr_scheduler": "polynomial"}, DDPM),
    ("lr_scheduler", ["linear", "polynomial", "constant", "constant_with_warmup"], {"lr_warmup_steps": 0}, DDPM),
    ("lr_warmup_steps", [0, 1], COSINE, DDPM),
    ("max_grad_norm", [0], {}, DDPM),
    ("max_sequence_length", [1, 512], {}, FLOW),
    ("max_train_samples", [1, 10**9], {}, DDPM),
    ("max_train_steps", [0, 1], {}, DDPM),
    ("mixed_precision", ["no", "bf16"], {}, DDPM),
    ("mode_scale", [0, -1], {"weighting_scheme": "mode"}, FLOW),
    ("noise_offset", [0, -0.1], {}, DDPM),
    ("num_train_epochs", [0, 1], {"max_train_steps": None}, DDPM),
    ("num_validation_images", [0, 1], PROMPT, DDPM),
    ("optimizer", ["AdamW", "adamw"], {}, DDPM),
    ("precondition_outputs", [0, 1], {}, FLOW),
    ("prediction_type", ["epsilon", "v_prediction"], {}, DDPM),
    ("prodigy_decouple", ["True", "false"], {"optimizer": "prodigy"}, DDPM),
    ("proportion_empty_prompts", [0, 1], {}, DDPM),
    ("rank", [1], {}, DDPM),
    ("report_to", ["tensorboard", "all", "none"], {}, DDPM),
    ("resume_from_checkpoint", ["latest"], {}, DDPM),
    ("seed", [0, 2**32 - 1], {}, DDPM),
    ("snr_gamma", [0, 5], {}, DDPM),
    ("text_encoder_lr", [0], {"train_text_encoder": True}, DDPM),
    ("timestep_bias_begin", [0, 999], RANGE, DDPM),
    ("timestep_bias_begin", [1000], {}, DDPM),  # without an effect
    ("timestep_bias_end", [1], RANGE, DDPM),
    ("timestep_bias_multiplier", [0.5], RANGE, DDPM),
    ("timestep_bias_portion", [1], {"timestep_bias_strategy": "later"}, DDPM),
    ("timestep_bias_strategy", ["earlier", "later", "range", "none"], {}, DDPM),
    ("tracker_project_name", ["a b"], {}, DDPM),
    ("train_batch_size", [1], {}, DDPM),
    ("validation_epochs", [0, 1], PROMPT, DDPM),
    ("validation_epochs", [0], {}, DDPM),
    ("validation_prompt", [""], {}, DDPM),
    ("validation_prompts", [""], {}, DDPM),
    ("weighting_scheme", ["sigma_sqrt", "logit_normal", "mode", "cosmap"], {}, FLOW),
]
REFUSED = [  # flag, values, the flags that it needs, the pipeline
    ("adam_beta1", [1, -0.1], {}, DDPM),
    ("adam_beta2", [1, -0.1], {}, DDPM),
    ("adam_epsilon", [0, -1], {}, DDPM),  # weights without a gradient would become NaN
    ("adam_weight_decay", [-1], {}, DDPM),
    ("checkpointing_steps", [0, -1], {}, DDPM),
    ("checkpoints_total_limit", [-1], {}, DDPM),
    ("dataloader_num_workers", [-1], {}, DDPM),
    ("dream_detail_preservation", [-1], {"dream_training": True}, DDPM),
    ("gradient_accumulation_steps", [0, -1], {}, DDPM),
    ("input_perturbation", ["nan"], {}, DDPM),
    ("learning_rate", [-1, "nan", "inf"], {}, DDPM),
    ("learning_rate", [0], {"optimizer": "prodigy"}, DDPM),
    ("logit_mean", ["nan"], {}, FLOW),
    ("logit_std", [-1], {}, FLOW),
    ("lr_num_cycles", [0], {"lr_scheduler": "cosine_with_restarts"}, DDPM),
    ("lr_power", ["inf"], {"lr_scheduler": "polynomial"}, DDPM),
    ("lr_warmup_steps", [-1], COSINE, DDPM),
    ("max_grad_norm", [-1, "nan"], {}, DDPM),
    ("max_sequence_length", [0, 513], {}, FLOW),
    ("max_train_samples", [0], {}, DDPM),
    ("max_train_steps", [-1], {}, DDPM),
    ("mixed_precision", ["fp16", "fp8"], {}, DDPM),
    ("mode_scale", ["nan"], {"weighting_scheme": "mode"}, FLOW),
    ("noise_offset", ["nan", "inf"], {}, DDPM),
    ("num_train_epochs", [-1], {}, DDPM),
    ("num_validation_images", [-1], PROMPT, DDPM),
    ("proportion_empty_prompts", [-0.1, 1.1], {}, DDPM),
    ("rank", [0, -1], {}, DDPM),
    ("report_to", ["", "neptune", "wandb,tensorboard"], {}, DDPM),
    ("resolution", [0, -8], {}, DDPM),
    ("resume_from_checkpoint", ["checkpoint-7"], {}, DDPM),
    ("seed", [-1, 2**32], {}, DDPM),
    ("snr_gamma", [-1, "nan"], {}, DDPM),
    ("timestep_bias_begin", [1000], RANGE, DDPM),
    ("timestep_bias_end", [1001], RANGE, DDPM),
    ("timestep_bias_multiplier", [0], RANGE, DDPM),
    ("timestep_bias_portion", [0, 1.1], {"timestep_bias_strategy": "later"}, DDPM),
    ("train_batch_size", [0, -1], {}, DDPM),
    ("validation_epochs", [-1], PROMPT, DDPM),
    ("weighting_scheme", ["uniform"], {}, FLOW),
]
NO_EDGES = {  # names and places; flags of diffusers' research script for LPL
    *("cache_dir", "caption_column", "dataset_config_name", "dataset_name", "hub_model_id", "hub_token"),
    *("image_column", "logging_dir", "non_ema_revision", "output_dir", "pretrained_model_name_or_path"),
    *("pretrained_vae_model_name_or_path", "revision", "train_data_dir", "variant", "local_rank", "prodigy_beta3"),
    *("prodigy_safeguard_warmup", "prodigy_use_bias_correction"),
    *("lpl_num_blocks", "lpl_start", "lpl_t_threshold", "lpl_loss_type", "lpl_norm_type", "lpl_weight"),
}


def rows(table):
    return [(name, value, flags, pipeline) for name, values, flags, pipeline in table for value in values]


def test_every_flag_of_diffusers_has_a_row():
    with_values = {name for kind, flags in FLAGS.items() if kind is not True for name in flags}
    assert with_values == {row[0] for row in (*ACCEPTED, *REFUSED)} | NO_EDGES


@pytest.mark.parametrize("name, value, flags, pipeline", rows(ACCEPTED))
def test_accepted(name, value, flags, pipeline, image_folder, tmp_path, request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parsed(request.getfixturevalue(pipeline), image_folder, tmp_path, **flags | {name: value})


@pytest.mark.parametrize("name, value, flags, pipeline", rows(REFUSED))
@pytest.mark.filterwarnings("ignore")
def test_refused(name, value, flags, pipeline, image_folder, tmp_path, request, capsys, no_weights):
    words = arguments(request.getfixturevalue(pipeline), image_folder, tmp_path, **flags | {name: value})
    message = refusal(capsys, words)
    assert name in message and str(value) in message, message


ZEROS = [("snr_gamma", 0), ("learning_rate", 0), ("max_train_steps", 0)]


@pytest.mark.parametrize("name, value", ZEROS)
def test_zeros_that_leave_something_out_are_warned_of(name, value, sd_pipeline, image_folder, tmp_path):
    with pytest.warns(UserWarning, match=f"--{name} 0"):
        parsed(sd_pipeline, image_folder, tmp_path, **{name: value})
