"""The declarations of flags: each complete and right in itself, and those pinned that other people depend on."""

from dataclasses import dataclass, fields
from typing import get_type_hints

import pytest

from lpl.config import Config, held_out
from lpl.config.command_line import Parser, build_parser
from lpl.config.config import FLAGS, GROUPS
from lpl.config.flag import AS_TRAINED, POSITIVE, OnResume, add_group, at_most, flag, flags_of
from lpl.config.foreign import Foreign
from lpl.config.groups import Output
from lpl.config.recipes import read_recipe
from lpl.evaluation.command import Request
from lpl.inspection.command import Inspection


ALL = [*GROUPS.values(), Foreign]

# By column: what a resumed run does where the flag has changed, if it does not warn; whether the flag is the machine's
# own, or which values a stranger's recipe may give it; its value for the held-out losses, if it is not the run's own.
PINNED = """
pretrained_model_name_or_path               model_on_the_hub
revision                                    is_revision
variant                                     is_word
non_ema_revision                            is_revision
pretrained_vae_model_name_or_path           on_the_hub
single_file_config                          on_the_hub
denoiser_model_name_or_path                 model_on_the_hub
merge_lora                                  all_on_the_hub
cache_dir                         silent    own
train_text_encoder                refused
prediction_type                   refused

lora                              refused
lora_init                                   model_on_the_hub
training_adapter                            model_on_the_hub
use_dora                          refused
use_rslora                        refused
init_lora_weights                 silent
adapter                           refused
decompose_both                    refused
decompose_factor                  refused
oft_block_size                    refused

dataset_name                                on_the_hub
train_data_dir                              within_the_data_set
datasets                                    are_public
mask_data_dir                               within_the_data_set
shuffle_tags                                                        False
tag_dropout                                                         0.0
data_cache_dir                    silent    own
center_crop                                                         True
cache_latents                     silent
cache_text_embeddings             silent
random_flip                                                         False
proportion_empty_prompts                                            0.0
text_encoder_dropout                                                None
dataloader_num_workers            silent

lpl_variant                                                         'paper'
lpl_max_samples                                                     None
lpl_crop                                                            None
lpl_student                                 on_the_hub              None
lpl_vae_name_or_path                        on_the_hub

snr_gamma                                                           None
noise_offset                                                        0.0
input_perturbation                                                  0.0
dream_training                                                      False
weighting_scheme                                                    None
precondition_outputs                                                0

num_train_epochs                  length
max_train_steps                   length
optimizer                         refused
use_8bit_adam                     refused
attention_backend                 silent    own
seed                              silent

dry_run                                     own
for_gpu                                     own
validation_prompt                 silent
validation_prompts                silent
validation_prompts_file                     own
num_validation_images             silent
validation_epochs                 silent
validation_steps                  silent
validation_sizes                  silent
validation_lora_scales            silent
validation_inference_steps        silent
validation_guidance_scale         silent
report_to                         silent    own
tracker_project_name              silent    own
logging_dir                       silent    own
logging_steps                     silent
debug_loss                        silent
verbose                           silent    own

eval_steps                        silent    own
eval_data_dir                     silent    own
eval_metrics                      silent    own
eval_features                     silent    own
eval_clip                         silent    own
eval_num_images                   silent    own
eval_batch_size                   silent    own

output_dir                        silent    own
save_single_file                  silent    own
checkpointing_steps               silent
checkpoints_total_limit           silent
resume_from_checkpoint                      own
push_to_hub                       silent    own
hub_model_id                      silent    own
hub_token                         silent    own
hub_private_repo                  silent    own
hub_revision                      silent    own
hub_strategy                      silent    own
"""


def line_of(name, declared):
    """The flag's line of the table; "" where all of it is as for most flags."""
    resume = "" if declared.on_resume is OnResume.WARNED else declared.on_resume.name.lower()
    whose = "own" if declared.own else declared.public.__name__ if declared.public else ""
    value = "" if declared.held_out is AS_TRAINED else repr(declared.held_out)
    return f"{name:34}{resume:10}{whose:24}{value}".rstrip() if resume or whose or value else ""


def test_resumes_strangers_and_held_out_losses_see_each_flag_as_ever():
    lines = [line_of(name, declared) for name, declared in FLAGS.items()]
    assert [line for line in lines if line] == [line for line in PINNED.splitlines() if line]


def test_a_flag_is_its_own_or_has_a_rule_not_both():
    assert not [name for name, declared in FLAGS.items() if declared.own and declared.public]


# Each declaration ----------------------------------------------------------------------------------------------------


def test_names_are_unique_over_all_groups():
    names = [name for group in ALL for name in flags_of(group)]
    assert len(names) == len(set(names)) and len(FLAGS) + len(flags_of(Foreign)) == len(names)


@pytest.mark.parametrize("group", ALL)
def test_the_docstring_of_a_group_is_a_title(group):
    title = group.__doc__
    assert title and title == title.strip() and "\n" not in title and not title.endswith(".") and len(title) < 40
    assert [other.__doc__ for other in ALL].count(title) == 1


def faults_of(group):
    """What is wrong with the defaults that a group declares."""
    for item in (item for item in fields(group) if "flag" in item.metadata):
        declared = item.metadata["flag"]
        try:
            declared.check(item.name, item.default)
        except ValueError as error:
            yield str(error)
        chosen = item.default if isinstance(item.default, tuple) else (item.default,)
        if declared.choices and item.default is not None and not set(chosen) <= set(declared.choices):
            yield f"--{item.name} {item.default}: not one of its choices"
        if not is_a(item.default, get_type_hints(group)[item.name]):
            yield f"--{item.name} {item.default!r}: not of its type"


def is_a(value, hint):
    """Whether a default is of the annotated type, exactly: an int is no float."""
    return type(value) in {getattr(part, "__origin__", part) for part in getattr(hint, "__args__", ())} | {hint} or (
        isinstance(value, tuple) and hint.__origin__ is tuple and all(type(item) is hint.__args__[0] for item in value)
    )


@pytest.mark.parametrize("group", ALL)
def test_defaults_are_what_their_flags_accept(group):
    assert not list(faults_of(group))


def test_a_default_that_its_flag_does_not_accept_is_found():
    @dataclass(frozen=True)
    class Wrong:
        """wrong"""

        steps: int = flag(0, "out of its range", range=POSITIVE)
        most: int | None = flag(11, "out of one of its ranges", range=(POSITIVE, at_most(10)))
        kind: str = flag("c", "none of its choices", choices=("a", "b"))
        rate: float = flag(1, "of another type")
        names: tuple[str, ...] = flag((1,), "of another type within")
        right: int | None = flag(None, "not given", range=POSITIVE)

    faults = list(faults_of(Wrong))
    assert [fault.split()[0] for fault in faults] == ["--steps", "--most", "--kind", "--rate", "--names"]
    assert faults[0] == "--steps 0: it must be more than 0"


@pytest.mark.parametrize("name", [name for name, declared in FLAGS.items() if declared.held_out is not AS_TRAINED])
def test_values_of_the_held_out_losses_are_what_their_flags_accept(name):
    declared = FLAGS[name]
    declared.check(name, declared.held_out)
    assert declared.held_out is None or not declared.choices or declared.held_out in declared.choices


def test_held_out_groups_change_these_flags_only():
    config = Config().changed(lpl_crop=16, lpl_distance="l1", noise_offset=0.1, logit_mean=0.5, center_crop=False)
    assert held_out(config.lpl) == Config().changed(lpl_distance="l1").lpl
    assert held_out(config.diffusion) == Config().changed(logit_mean=0.5).diffusion
    assert held_out(config.data) == Config().changed(center_crop=True, proportion_empty_prompts=0.0).data


# Places --------------------------------------------------------------------------------------------------------------

PLACES = {
    (group, name) for group in (*ALL, Request, Inspection) for name in flags_of(group) if flags_of(group)[name].path
}


def parsed_by(group, word):
    """What a parser with that group's flags alone makes of a word."""
    parser = Parser(prog="test")
    add_group(parser, group)
    for action in parser.flags:
        action.required = False
    return vars(parser.parse_args([word]))


@pytest.mark.parametrize("group, name", sorted(PLACES, key=str))
def test_a_place_may_lie_in_the_home_folder(group, name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    value = parsed_by(group, f"--{name}=~/x")[name]
    assert value in (str(tmp_path / "x"), [str(tmp_path / "x")])


def test_a_flag_that_is_named_like_a_place_is_declared_as_one():
    ends = ("_dir", "_path", "_file", "config", "_features", "_clip", "_from_checkpoint")
    named = {(group, name) for group in (*ALL, Request, Inspection) for name in flags_of(group) if name.endswith(ends)}
    assert named - {(Output, "save_single_file")} <= PLACES  # which takes a precision


def test_a_place_of_a_recipe_may_lie_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("output_dir: ~/runs/x\neval_features: [inception, ~/network]\n")
    values = read_recipe(build_parser(), str(tmp_path / "recipe.yaml")).values
    assert values == {"output_dir": f"{tmp_path}/runs/x", "eval_features": ["inception", f"{tmp_path}/network"]}
