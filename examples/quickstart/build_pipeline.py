"""Builds an untrained text-to-image pipeline, a tiny Stable Diffusion 3; in two minutes on one core.

Its parts:
- the autoencoder comes from train_autoencoder.py (--vae);
- the tokenizer's byte pairs are learnt from the captions; it contains every single byte, so that it accepts any
  prompt;
- the two text encoders are trained here like CLIP, captions against pictures, with a small image tower that is then
  discarded; this takes most of the time; afterwards they stay frozen;
- the transformer is initialised like DiT and untrained: samples are noise until it is trained.

The T5 encoder is a stand-in that returns zeros, see `build_t5`. It returns `max_sequence_length` of them, by default
256: train and sample with the same small `max_sequence_length`, see README.md.

Transformer and autoencoder are stored as float16 (diffusers loads them as float32), the text encoders as float32,
since transformers keeps the type of the file.

    python examples/quickstart/build_pipeline.py --vae quickstart/autoencoder --output_dir quickstart/untrained
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from make_data import DATA, read_pictures
from tokenizers import pre_tokenizers, trainers
from torch import nn
from tqdm import trange
from train_autoencoder import to_unit_range
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


PROMPT_TOKENS = 16  # the longest caption has 14 with its two ends; every token costs attention in all the steps


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with the merges that make every word of the captions one token.

    As in CLIP's own vocabulary all 256 bytes come first, then all bytes that end a word, the merges, and last the two
    special tokens.
    """
    learner = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int, width: int) -> CLIPTextModelWithProjection:
    """Small, and otherwise CLIP's; Stable Diffusion 3 takes the tokens of its last layer but one."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A stand-in that returns zeros for every prompt.

    diffusers also uses zeros for a Stable Diffusion 3 without T5, but loads such a pipeline only with
    `text_encoder_3=None, tokenizer_3=None`, and this one should load like any other.
    """
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def build_image_tower(width: int) -> nn.Module:
    """Pictures -> (B, width). Only the training of the text encoders needs it."""
    widths = (3, 32, 64, 128, 128)
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], width))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(B, PROMPT_TOKENS), exactly as the pipeline tokenizes prompts"""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def moved(pictures: torch.Tensor, most: int = 8) -> torch.Tensor:
    """All moved alike on a white ground: uint8 -> pixels [-1, 1]"""
    side = pictures.shape[-1]
    down, right = (random.randint(0, 2 * most) for _ in range(2))
    padded = F.pad(to_unit_range(pictures), (most,) * 4, value=1.0)
    return padded[:, :, down : down + side, right : right + side]


def drop_words(caption: str, chance: float = 0.3) -> str:
    """Drops words at random, but keeps at least one, so that prompts other than the captions work as well."""
    words = caption.split()
    return " ".join(word for word in words if random.random() >= chance) or random.choice(words)


def similarity(texts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Cosines, (T, I)"""
    return F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T


def contrastive_loss(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """CLIP's loss; `same` (B, B) marks the pairs with one caption, which all count as correct."""
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_text_encoders(
    encoders: list[CLIPTextModelWithProjection],
    tokenizer: CLIPTokenizer,
    pictures: torch.Tensor,
    captions: list[str],
    steps: int,
    batch_size: int = 64,
) -> None:
    """Trains the encoders on captions with words left out, then prints how well captions and pictures match."""
    tower, scale = build_image_tower(encoders[0].config.projection_dim), nn.Parameter(torch.tensor(2.0))
    parameters = [*tower.parameters(), scale, *(p for encoder in encoders for p in encoder.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    numbers = torch.tensor([sorted(set(captions)).index(caption) for caption in captions])
    bar = trange(steps, desc="text encoders", mininterval=5)
    for _ in bar:
        chosen = torch.randint(len(pictures), (batch_size,))
        images = tower(moved(pictures[chosen]))
        tokens = tokenize(tokenizer, [drop_words(captions[index]) for index in chosen.tolist()])
        same = (numbers[chosen, None] == numbers[chosen]).float()
        logits = [scale.exp() * similarity(encoder(tokens).text_embeds, images) for encoder in encoders]
        losses = torch.stack([contrastive_loss(each, same) for each in logits])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {losses.mean().item():.2f}", refresh=False)
    report_retrieval(encoders, tower, tokenizer, pictures, captions)


@torch.no_grad()
def report_retrieval(
    encoders: list[CLIPTextModelWithProjection],
    tower: nn.Module,
    tokenizer: CLIPTokenizer,
    pictures: torch.Tensor,
    captions: list[str],
) -> None:
    """Prints how often a picture's caption is among the two closest ones."""
    distinct = sorted(set(captions))
    images = tower(to_unit_range(pictures))  # (N, width)
    own = torch.tensor([distinct.index(caption) for caption in captions])
    for number, encoder in enumerate(encoders, start=1):
        closest = similarity(encoder(tokenize(tokenizer, distinct)).text_embeds, images).topk(2, dim=0).indices
        found = (closest == own).any(dim=0).float().mean()
        print(f"text encoder {number}: the right caption is among the closest 2 of {len(distinct)} in {found:.1%}")


def build_transformer(vae: AutoencoderKL, text_width: int, layers: int, heads: int) -> SD3Transformer2DModel:
    """Stable Diffusion 3's transformer, initialised as DiT's: all blocks start as the identity, the output as zero."""
    sample_size = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    transformer = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        caption_projection_dim=heads * 32,
        joint_attention_dim=text_width,  # tokens of the two encoders side by side
        pooled_projection_dim=text_width,
        pos_embed_max_size=sample_size,  # half as many tokens would do; these admit pictures of twice the side
        qk_norm="rms_norm",
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for linear in (*(norm.linear for norm in norms), transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
    return transformer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="Folder written by train_autoencoder.py.")
    parser.add_argument("--data", type=Path, default=DATA / "plain", help="folder with a Parquet file of make_data.py")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the pipeline.")
    parser.add_argument("--layers", type=int, default=4, help="Blocks of the transformer (default: %(default)s).")
    parser.add_argument(
        "--heads", type=int, default=6, help="Attention heads of the transformer, of width 32 (default: %(default)s)."
    )
    parser.add_argument(
        "--text_steps", type=int, default=1000, help="Training steps of the text encoders (default: %(default)s)."
    )
    parser.add_argument(
        "--text_width", type=int, default=64, help="Of the text encoders, a multiple of 32 (default: %(default)s)."
    )
    parser.add_argument("--seed", type=int, default=0, help="Random seed (default: %(default)s).")
    args = parser.parse_args()
    if min(args.layers, args.heads, args.text_steps) < 1:
        parser.error("--layers, --heads and --text_steps have to be positive")
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    pictures, captions = read_pictures(args.data)
    tokenizer = build_tokenizer(captions)
    encoders = [build_text_encoder(tokenizer, layers, args.text_width) for layers in (2, 3)]
    train_text_encoders(encoders, tokenizer, pictures, captions, args.text_steps)
    vae = AutoencoderKL.from_pretrained(args.vae)
    text_width = args.text_width * len(encoders)
    transformer = build_transformer(vae, text_width, args.layers, args.heads)
    t5, t5_tokenizer = build_t5(text_width)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.half(),
        # No shift of the noise levels: SD3's 3.0 makes up for the redundancy of 1024 pixels; small ones have none.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae.half(),
        text_encoder=encoders[0].eval(),
        tokenizer=tokenizer,
        text_encoder_2=encoders[1].eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=t5.eval(),
        tokenizer_3=t5_tokenizer,
    )
    pipeline.save_pretrained(args.output_dir)

    parts = {"transformer": transformer, "vae": vae, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    sizes = ", ".join(f"{name} {part.num_parameters() / 1e6:.2f}" for name, part in parts.items())
    total = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file())
    print(f"{args.output_dir}: {total / 1e6:.1f} MB; millions of parameters: {sizes}")


if __name__ == "__main__":
    main()
