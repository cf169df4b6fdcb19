"""The rows of the study: a *row* continues the training of a base with its own flags, on the same data and noise.

Rows learn emoji of people with a medium skin tone; bases know these without a tone. `--rows` of run.py takes the names
of rows; `flags` are added to SETTINGS. A *base* is the model they begin with: the quickstart's pipeline, trained
without LPL, or one of BASES, which run.py trains, anew, with another objective, with LPL's student or on guided
samples. Rows with `of` measure another row's model under another `sampling`.
"""

from dataclasses import dataclass, field


SETTINGS = {
    "resolution": 96,
    "max_sequence_length": 4,
    "train_batch_size": 16,
    "use_ema": True,
    "proportion_empty_prompts": 0.1,
    "lr_scheduler": "cosine",
    "center_crop": True,
    "cache_latents": True,
    "cache_text_embeddings": True,
    "report_to": "none",
    "logging_steps": 50,
}
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 1}
NONE: dict[str, object] = {"lpl_weight": "0"}
LPL: dict[str, object] = {"lpl_weight": "auto:0.2"}
# What auto:0.2 finds; as a number, so that a student is alone from the start
WEIGHTS = {"flow": "0.3", "epsilon": "0.1"}
STUDENT: dict[str, object] = {"lpl_weight": WEIGHTS["flow"], "lpl_student": "examples/quickstart/student"}
CONVERGED = "quickstart"  # the base that is there: its denoiser was trained for 16,000 steps
ANEW = {
    "from_scratch": True,
    **NONE,
    "train_batch_size": 32,
    "max_train_steps": 6000,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 200,
    "adam_weight_decay": 0.01,
    "ema_decay": 0.998,
    "seed": 100,
}
OTHER_OBJECTIVE = {name: value for name, value in ANEW.items() if name != "from_scratch"} | {"max_train_steps": 3000}
BASES: dict[str, dict[str, object]] = {
    "early": ANEW,
    "earlier": ANEW | {"max_train_steps": 3000},
    "earlier_student": ANEW | {"max_train_steps": 3000} | STUDENT,
    "epsilon": OTHER_OBJECTIVE | {"prediction_type": "epsilon"},  # from the quickstart's weights
    "v": OTHER_OBJECTIVE | {"prediction_type": "v_prediction"},
    "guided": OTHER_OBJECTIVE
    | {"max_train_steps": 1500, "proportion_empty_prompts": 0, "train_data_dir": "{study}/guided"},
}
GUIDED = {"guidance_scale": 3}  # the quickstart's pipeline draws what the base "guided" learns: its best images
ROW = {
    "max_train_steps": 200,
    "learning_rate": 2e-4,
    "lr_warmup_steps": 20,
    "ema_decay": 0.99,
    "validation_every_nth": 10,
    "validation_steps": 10**6,  # only before the first step and after the last one
}


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    table: str
    label: str
    flags: dict[str, object] = field(default_factory=dict)
    base: str = CONVERGED
    paper: str = ""  # what the paper reports for it: FID on ImageNet-1k at 512 px, and words
    without: str = "flow"  # the row without LPL that its change is relative to
    of: str | None = None  # the row whose model is measured
    sampling: dict[str, object] = field(default_factory=dict)
    cheap: bool = False  # it is compared with what costs less than LPL, in the table "cheap" too


MID = LPL | {"lpl_blocks": "mid"}
LONG: dict[str, object] = {"max_train_steps": 1000}
SMALL: dict[str, object] = {"lora": True, "rank": 16, "max_train_samples": 20, "learning_rate": 1e-3}
ROWS = {
    # Table 3: with LPL or without, by objective
    "flow": Row("objective", "flow matching", NONE, paper="4.54"),
    "flow_lpl": Row("objective", "flow matching, LPL", LPL, paper="3.61"),
    "epsilon": Row("objective", "epsilon", NONE, "epsilon", "4.88", "epsilon"),
    "epsilon_lpl": Row("objective", "epsilon, LPL", LPL, "epsilon", "3.79", "epsilon"),
    "v": Row("objective", "v prediction", NONE, "v", "4.72", "v"),
    "v_lpl": Row("objective", "v prediction, LPL", LPL, "v", "3.84", "v"),
    # Fig. 10: the weight
    "share_5": Row("weight", "share of 5%", {"lpl_weight": "auto:0.05"}),
    "share_50": Row("weight", "share of 50%", {"lpl_weight": "auto:0.5"}),
    "share_80": Row("weight", "share of 80%", {"lpl_weight": "auto:0.8"}),
    "weight_3": Row("weight", "w = 3", {"lpl_weight": "3.0"}, paper='best, "roughly a fifth"'),
    # Sec. 4.3: statistics
    "detach": Row("statistics", "shared, detached", LPL | {"lpl_detach_statistics": True}),
    "separate": Row(
        "statistics",
        "separate",
        LPL | {"lpl_normalization": "separate"},
        paper="4.79; 3.79 for shared, 4.88 without LPL",
    ),
    "none": Row("statistics", "none", LPL | {"lpl_normalization": "none"}),
    # Sec. 8: masks
    "no_mask": Row("masks", "no masks", LPL | {"lpl_no_outlier_mask": True}),
    # Sec. 3.2: depth weights
    "uniform": Row("depth", "uniform", LPL | {"lpl_depth_weighting": "uniform"}, paper="4.38; 3.79 for inverse"),
    "exponential": Row("depth", "exponential", LPL | {"lpl_depth_weighting": "exponential"}),
    # Fig. 8: blocks
    "mid": Row("blocks", "mid", MID, paper="no gain", cheap=True),
    "mid_up_0": Row("blocks", "mid, up_0", LPL | {"lpl_blocks": "mid up_0"}, paper="no gain to speak of"),
    "mid_up_1": Row("blocks", "mid, up_0, up_1", LPL | {"lpl_blocks": "mid up_0 up_1"}, paper="better by more than 1"),
    "mid_up_2": Row("blocks", "mid, up_0 to up_2", LPL | {"lpl_blocks": "mid up_0 up_1 up_2"}, paper="near the best"),
    "rgb": Row("blocks", "pixels", LPL | {"lpl_blocks": "rgb"}, paper="worse than without LPL"),
    # Fig. 7: threshold, as it is at 96 px
    "tau_1": Row(
        "threshold", "tau = 1 at 96 px", LPL | {"lpl_sigma_threshold": 1, "lpl_threshold_base_resolution": 0}
    ),
    "tau_3": Row(
        "threshold",
        "tau = 3 at 96 px",
        LPL | {"lpl_sigma_threshold": 3, "lpl_threshold_base_resolution": 0},
        paper="best from 3 to 6",
    ),
    "tau_12": Row(
        "threshold", "tau = 12 at 96 px", LPL | {"lpl_sigma_threshold": 12, "lpl_threshold_base_resolution": 0}
    ),
    # Fig. 11: decay of the EMA. A larger one than ROW's is not reached: it begins at (1 + step) / (10 + step)
    "ema_0": Row("ema", "no EMA", NONE | {"ema_decay": 0}, without="ema_0"),
    "ema_0_lpl": Row("ema", "no EMA, LPL", LPL | {"ema_decay": 0}, without="ema_0"),
    # Table 4: how long the base was trained before
    "earlier": Row("before", "base of 3,000 steps", NONE, "earlier", without="earlier"),
    "earlier_lpl": Row("before", "base of 3,000 steps, LPL", LPL, "earlier", without="earlier"),
    "earlier_student": Row(
        "before", "base of 3,000 steps with the student, student", STUDENT, "earlier_student", without="earlier"
    ),
    "early": Row("before", "base of 6,000 steps", NONE, "early", without="early"),
    "early_lpl": Row("before", "base of 6,000 steps, LPL", LPL, "early", without="early"),
    # A base whose images are guided ones without guidance
    "guided": Row("guidance", "base distilled from guidance 3", NONE, "guided", without="guided"),
    "guided_lpl": Row("guidance", "base distilled from guidance 3, LPL", LPL, "guided", without="guided"),
    # A small domain
    "small": Row("domain", "LoRA on 20 images", NONE | SMALL, without="small"),
    "small_lpl": Row("domain", "LoRA on 20 images, LPL", LPL | SMALL, without="small"),
    "small_student": Row("domain", "LoRA on 20 images, student", STUDENT | SMALL, without="small"),
    # How long rows are
    "long": Row("length", "1,000 steps", NONE | LONG, without="long"),
    "long_lpl": Row("length", "1,000 steps, LPL", LPL | LONG, without="long"),
    "long_student": Row("length", "1,000 steps, student", STUDENT | LONG, without="long"),
    "long_half": Row("length", "1,000 steps, student, w = 1", STUDENT | LONG | {"lpl_weight": "1"}, without="long"),
    # Where the gradients conflict
    "projected": Row("conflict", "LPL's conflicting part removed", LPL | {"lpl_project_conflicts": True}),
}
# Fig. 9 and guidance: the same models, sampled otherwise
SAMPLED = {"flow": ("", ""), "flow_lpl": ("_lpl", ", LPL"), "detach": ("_detach", ", LPL, statistics detached")}
for table, name, label, values, names in (
    ("sampling", "num_inference_steps", "{} sampling steps", (5, 10, 50), ("flow", "flow_lpl")),
    ("guidance", "guidance_scale", "guidance {}", (1.5, 2, 3, 4), SAMPLED),
):
    for value in values:
        key = f"{table}_{value:g}".replace(".", "_")
        for row in names:
            ending, words = SAMPLED[row]
            ROWS[key + ending] = Row(
                table,
                label.format(value) + words,
                ROWS[row].flags,
                without=key,
                of=row,
                sampling={name: value},
            )
# LPL for less: what a student, its corrections, a small decoder and fewer steps with LPL keep of its gain
CHEAP: dict[str, tuple[str, dict[str, object]]] = {
    "student": ("student", STUDENT),
    "corrected": ("student, corrected every 8th step", STUDENT | {"lpl_correct_every": 8}),
    "tiny": ("small distilled decoder", LPL | {"lpl_vae_name_or_path": "{study}/small_decoder"}),
    "every_4": ("every 4th step", LPL | {"lpl_every": 4}),
    "every_8": ("every 8th step", LPL | {"lpl_every": 8}),
    "samples_4": ("4 samples of a batch", LPL | {"lpl_max_samples": 4}),
    # Step times do not depend on the objective
    "longer": ("without LPL, for as long as LPL", NONE | {"max_train_steps": "as flow_lpl"}),
    "longer_student": ("without LPL, for as long as the student", NONE | {"max_train_steps": "as flow_student"}),
}
for plain in ("flow", "epsilon"):
    for name, (label, flags) in CHEAP.items():
        own = flags | ({"lpl_weight": WEIGHTS[plain]} if "lpl_student" in flags else {})
        label = f"{ROWS[plain].label}, {label}"
        ROWS[f"{plain}_{name}"] = Row("cheap", label, own, ROWS[plain].base, "", plain, cheap=True)
ROWS["epsilon_mid"] = Row("cheap", "epsilon, mid block alone", MID, "epsilon", "", "epsilon", cheap=True)
