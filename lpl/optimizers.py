"""The optimizer that the flags ask for."""

from __future__ import annotations

from argparse import Namespace

import torch

from lpl.trainee import Trainee


def make_optimizer(args: Namespace, trainee: Trainee, global_batch: int) -> torch.optim.Optimizer:
    """AdamW, in 8 bits with --use_8bit_adam, or Prodigy; text encoders have a learning rate of their own."""
    factor = global_batch if args.scale_lr else 1
    groups = [{"params": trainee.parameters_of(trainee.denoiser)}]
    if trainee.text_encoders:
        groups.append(
            {
                "params": trainee.parameters_of(*trainee.text_encoders),
                "lr": args.text_encoder_lr * factor,
                "weight_decay": args.adam_weight_decay_text_encoder,
            }
        )
    shared = {
        "lr": args.learning_rate * factor,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.optimizer.lower() == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups,
            **shared,
            beta3=args.prodigy_beta3,
            decouple=args.prodigy_decouple,
            use_bias_correction=args.prodigy_use_bias_correction,
            safeguard_warmup=args.prodigy_safeguard_warmup,
        )
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **shared)
    return torch.optim.AdamW(groups, **shared)
