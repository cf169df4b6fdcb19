"""The architectures of the newer models that recipes name: the numbers of their config.json.

They are counted (:mod:`benchmarks.counted`), and not measured on a GPU as those of :mod:`benchmarks.real_sizes` are.
"""

from __future__ import annotations

import diffusers

from benchmarks.real_sizes import CHECKPOINTING, TINY_KL_VAE, WITHOUT_QUANT_CONVS, Model, kl_vae


FLUX_VAE = kl_vae(
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024, **WITHOUT_QUANT_CONVS
)

NEWER = {
    "z-image": Model(
        public="Tongyi-MAI/Z-Image",
        pipeline=diffusers.ZImagePipeline,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        denoiser=(diffusers.ZImageTransformer2DModel, {}),  # the class's defaults are its numbers
        vae=(diffusers.AutoencoderKL, FLUX_VAE),
        parameters=(6_154_908_736, 83_819_683),
        encoders=(("", "qwen3", 2560, 0),),
        tiny=(
            {
                "dim": 32,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 16,
                "axes_dims": (4, 6, 6),
            },
            TINY_KL_VAE,
            ((16, 0),),
        ),
        resolution=(1024, 64),
        batch=1,
        kinds=("lora",),
        flags=CHECKPOINTING,
    ),
}
