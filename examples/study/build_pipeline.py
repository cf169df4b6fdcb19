"""Builds the study's untrained model: a DiT of 2.9 million parameters with class labels, and the autoencoder.

python examples/study/build_pipeline.py --vae study/autoencoder --output_dir study/untrained
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from prepare_data import PICTURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.vae)
    vae.register_to_config(shift_factor=None)  # DiT's pipeline ignores it
    transformer = DiTTransformer2DModel(
        num_attention_heads=args.width // 32,
        attention_head_dim=32,
        num_layers=args.layers,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        sample_size=vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1),
        patch_size=2,
    )
    names = {str(label): Path(source).stem for label, source in enumerate(PICTURES)}
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    pipeline = DiTPipeline(transformer, vae, scheduler)
    pipeline.register_to_config(id2label=names)  # the pipeline reads it from its index, but does not write it
    pipeline.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {transformer.num_parameters() / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
