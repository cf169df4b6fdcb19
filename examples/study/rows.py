"""The rows of the study: a *row* continues the training of a base with its own flags, on the same data and noise.

`--rows` of run.py takes the names of rows; `flags` are added to SETTINGS. Rows of one objective share a base, the
model trained from scratch without LPL.
"""

from dataclasses import dataclass, field


SETTINGS = {
    "resolution": 64,
    "train_batch_size": 32,
    "mixed_precision": "bf16",
    "use_ema": True,
    "proportion_empty_prompts": 0,
    "lr_scheduler": "cosine",
    "report_to": "none",
    "logging_steps": 50,
}
BASE = {
    "from_scratch": True,
    "lpl_weight": "0",
    "max_train_steps": 4000,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 200,
    "adam_weight_decay": 0.01,
    "ema_decay": 0.998,
    "seed": 100,
}
ROW = {"max_train_steps": 600, "learning_rate": 3e-4, "lr_warmup_steps": 20, "ema_decay": 0.99}
OBJECTIVES = ("flow_matching", "epsilon", "v_prediction")


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    table: str
    label: str
    flags: dict[str, object] = field(default_factory=dict)
    objective: str = "flow_matching"
    paper: str = ""  # what the paper reports for it: FID on ImageNet-1k at 512 px, and words
    timed: bool = True  # False: other jobs ran beside it, so its times tell nothing
    without: str | None = None  # the row that its change is relative to; None: its objective's without LPL


LPL = {"lpl_weight": "auto:0.2"}
STUDENT = LPL | {"lpl_student": "{study}/student"}
ROWS = {
    # Table 3: with LPL or without, by objective
    "flow": Row("objective", "flow matching", {"lpl_weight": "0"}, paper="4.54"),
    "flow_lpl": Row("objective", "flow matching, LPL", LPL, paper="3.61"),
    "epsilon": Row("objective", "epsilon", {"lpl_weight": "0"}, "epsilon", paper="4.88"),
    "epsilon_lpl": Row("objective", "epsilon, LPL", LPL, "epsilon", paper="3.79"),
    "v": Row("objective", "v prediction", {"lpl_weight": "0"}, "v_prediction", paper="4.72", timed=False),
    "v_lpl": Row("objective", "v prediction, LPL", LPL, "v_prediction", paper="3.84", timed=False),
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
    "mid": Row("blocks", "mid", LPL | {"lpl_blocks": "mid"}, paper="no gain"),
    "mid_up_0": Row("blocks", "mid, up_0", LPL | {"lpl_blocks": "mid up_0"}, paper="no gain to speak of"),
    "mid_up_1": Row("blocks", "mid, up_0, up_1", LPL | {"lpl_blocks": "mid up_0 up_1"}, paper="better by more than 1"),
    "rgb": Row("blocks", "pixels", LPL | {"lpl_blocks": "rgb"}, paper="worse than without LPL"),
    # Fig. 7: threshold, as it is at 64 px
    "tau_1": Row("threshold", "tau = 1", LPL | {"lpl_sigma_threshold": 1, "lpl_threshold_base_resolution": 0}),
    "tau_3": Row(
        "threshold",
        "tau = 3",
        LPL | {"lpl_sigma_threshold": 3, "lpl_threshold_base_resolution": 0},
        paper="best from 3 to 6",
    ),
    "tau_12": Row("threshold", "tau = 12", LPL | {"lpl_sigma_threshold": 12, "lpl_threshold_base_resolution": 0}),
    # Quality against time
    "every_4": Row("time", "every 4th step", LPL | {"lpl_every": 4}),
    "samples_4": Row("time", "4 samples of a batch", LPL | {"lpl_max_samples": 4}),
    "flow_longer": Row("time", "without LPL, for as long", {"lpl_weight": "0", "max_train_steps": "as flow_lpl"}),
}
# LPL for less: what a student, its corrections, a small decoder and fewer steps with LPL keep of its gain
CHEAP: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("without LPL", {"lpl_weight": "0"}),
    "lpl": ("LPL", LPL),
    "student": ("student", LPL | {"lpl_student": "{study}/student"}),
    "corrected": (
        "student, corrected every 8th step",
        LPL | {"lpl_student": "{study}/student", "lpl_correct_every": 8},
    ),
    "brief": ("less faithful student", LPL | {"lpl_student": "{study}/brief_student"}),
    "brief_corrected": (
        "less faithful student, corrected every 8th step",
        LPL | {"lpl_student": "{study}/brief_student", "lpl_correct_every": 8},
    ),
    "tiny": ("small distilled decoder", LPL | {"lpl_vae_name_or_path": "{study}/small_decoder"}),
    "every_4": ("every 4th step", LPL | {"lpl_every": 4}),
    "every_8": ("every 8th step", LPL | {"lpl_every": 8}),
    "longer": ("without LPL, for as long as LPL", {"lpl_weight": "0", "max_train_steps": "as {kind}_lpl"}),
    "longer_student": (
        "without LPL, for as long as the student",
        {"lpl_weight": "0", "max_train_steps": "as {kind}_student"},
    ),
}
for objective, kind in (("flow_matching", "cheap_flow"), ("epsilon", "cheap_epsilon")):
    for name, (label, flags) in CHEAP.items():
        own = {
            flag: value.replace("{kind}", kind) if isinstance(value, str) else value for flag, value in flags.items()
        }
        words = f"{objective.replace('_', ' ')}, {label}"
        ROWS[f"{kind}_{name}"] = Row("cheap", words, own, objective, without=f"{kind}_plain")


PLAIN = {"flow_matching": "flow", "epsilon": "epsilon", "v_prediction": "v"}  # the row without LPL, by objective


def without(row: Row) -> str:
    """The row without LPL that a row is compared with."""
    return row.without or PLAIN[row.objective]
