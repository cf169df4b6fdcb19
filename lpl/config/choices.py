"""Choices of flags, and defaults that several files use. The choices of the loss are in lpl.options."""

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
ENDLESS_SCHEDULERS = ("constant", "constant_with_warmup")
OPTIMIZERS = ("AdamW", "prodigy")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio", "mlflow", "clearml", "dvclive", "swanlab")  # accelerate's
INTERPOLATION_MODES = ("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos")  # torchvision's
HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")  # as transformers' Trainer names them
NEIGHBOUR_METRICS = ("precision", "recall", "density", "coverage")
SET_METRICS = ("fid", "kid", *NEIGHBOUR_METRICS)  # compare two sets of images
CLIP_SCORE = "clip_score"  # compares images with their captions
METRICS = (*SET_METRICS, CLIP_SCORE)
CLIP = "openai/clip-vit-base-patch32"  # the model of the CLIPScore paper (Hessel et al., 2021)
EMA_DECAY, EMA_DECAY_WITH_LPL = 0.9999, 0.99975  # Sec. 4.3, "Impact on EMA"
ALL_LINEAR = "all-linear"  # adapts every linear layer, as in peft
LORA, LOHA, LOKR, OFT = ADAPTERS = ("lora", "loha", "lokr", "oft")
ADAPTER_NAMES = {LORA: "LoRA", LOHA: "LoHa", LOKR: "LoKr", OFT: "OFT"}
INIT_LORA_WEIGHTS = ("gaussian", "default", "orthogonal")  # peft's that leave the base alone and need no data
RANK = 4  # the default of diffusers' LoRA scripts
GPUS = {  # MiB, as nvidia-smi shows them
    "rtx3060": 12288,
    "rtx3090": 24576,
    "rtx4070": 12282,
    "rtx4080": 16376,
    "rtx4090": 24564,
    "rtx5090": 32607,
    "t4": 15360,
    "l4": 23034,
    "a10": 23028,
    "v100": 32768,
    "l40s": 46068,
    "a6000": 49140,
    "a100": 81920,
    "h100": 81559,
    "h200": 143771,
    "b200": 183359,
}
WITHOUT_BFLOAT16 = ("t4", "v100")
PRECISIONS = ("fp32", "fp16", "bf16")  # of the weights in a single file
MASK_COLUMN = "mask"  # of the loss masks of a folder of images

# --quantize_base: the package that each needs, as it is imported and as it is installed
FP8 = "fp8"
QUANTIZED: dict[str, tuple[str, str] | None] = {
    **dict.fromkeys(("8bit", "4bit"), ("bitsandbytes", "bitsandbytes")),
    FP8: None,
    **dict.fromkeys(("torchao:int8wo", "torchao:float8wo"), ("torchao", "torchao")),
    **dict.fromkeys(("quanto:int8", "quanto:float8", "quanto:int4"), ("optimum.quanto", "optimum-quanto")),
}
ON_A_GPU = tuple(name for name in QUANTIZED if name != FP8 and not name.startswith("torchao:"))
