"""The latent perceptual loss in your own training loop, in one function.

from lpl import LatentPerceptualLoss, get_objective

loss_fn = LatentPerceptualLoss(vae)
objective = get_objective("epsilon", noise_scheduler)
"""

import torch
import torch.nn.functional as F


def training_loss(unet, objective, loss_fn, latents, embeddings, weight=1.0, sigma_threshold=6.0):
    """Diffusion loss plus LPL (Eq. 3), for scaled latents (B, C, h, w) and text embeddings (B, tokens, dim).

    The threshold is 3 at 256 px and scales with the image side: 6 at 512 px, 12 at 1024 px (Sec. 4.1).
    """
    noise = torch.randn_like(latents)
    timesteps = torch.randint(objective.num_train_timesteps, (len(latents),), device=latents.device)  # (B,)
    noisy_latents = objective.add_noise(latents, noise, timesteps)
    model_output = unet(noisy_latents.to(unet.dtype), timesteps, embeddings).sample
    loss = F.mse_loss(model_output.float(), objective.target(latents, noise, timesteps))

    inside = objective.sigma(timesteps) <= sigma_threshold  # noise low enough for a useful z0_hat
    if inside.any():
        predicted_latents = objective.clean_latents(model_output[inside], noisy_latents[inside], timesteps[inside])
        loss = loss + weight * loss_fn(predicted_latents, latents[inside]).sum() / len(latents)
    return loss
