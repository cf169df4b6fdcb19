"""The names in a run's output folder, each once.

None of them may change: users, published models and resumed runs depend on them.
"""

# The result
INDEX = "model_index.json"  # of a pipeline
LORA = "pytorch_lora_weights.safetensors"  # of diffusers' LoRA
PEFT_SUFFIX = "_lora"  # of the folder with peft's LoRA, after the component's name
PEFT_CONFIG = "adapter_config.json"  # in that folder
OTHERS_SUFFIX = "_comfyui.safetensors"  # of the LoRA for other programs, after the run's name
OTHERS_PREVIEW = "_comfyui.preview.png"  # of the picture that other programs show for it
SINGLE_FILE = "_single_file.safetensors"  # of a pipeline as one file, after the run's name
CARD = "README.md"

# The run
RECIPE = "recipe.yaml"
LOG = "metrics.jsonl"
SAMPLE_LOSSES = "sample_losses.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"
CURVES = "loss_curves.png"
SAMPLES = "samples"
BEFORE_AFTER = "samples/before_after.png"
CHECKPOINTS = "samples/checkpoints.png"
LORA_SCALES = "samples/lora_scales.png"
SETTINGS = "settings.json"  # beside generated images: the settings that generated them
EVALUATION = "evaluation"
EVALUATION_FILE = "evaluation.json"  # in that folder, or in the one that lpl.evaluate is given
EVALUATION_TABLE = "evaluation.md"
EVALUATION_IMAGES = "images"
EVALUATION_CURVES = "evaluation/curves.png"

EARLIER_RUN = "earlier-run"  # what an earlier run left
EARLIER_EVALUATION = "earlier-evaluation"  # what this run has measured against another reference

# Checkpoints
CHECKPOINT_PREFIX = "checkpoint-"
PROGRESS = "progress.json"
STATE = "state.safetensors"
RANDOM_STATE = "random-{}.safetensors"  # of each process
EMA = "ema"
EMA_COUNT = "ema.json"
LAST_CHECKPOINT = "last-checkpoint"  # on the Hub, as transformers' Trainer names it

# Temporary; all begin with a dot
LOCK = ".lock"  # stays, and says nothing by itself: whether somebody holds it counts
UPLOADS = ".uploads"
DOWNLOADS = ".download"
