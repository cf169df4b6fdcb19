"""The study's feature network: classifies crops of the pictures; its 64 activations are the features for the metrics.

It is trained on the part `features`, which shares no pixel with the denoiser's data or the reference. Fréchet
distances on these features compare models of this study only.

    python examples/study/features.py --data study/data/features --held_out study/data/reference

With `python -m lpl.evaluate`, use `--features examples.study.features:load`.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange


DIM = 64
SIDE = 64  # pixels
WEIGHTS = Path(os.environ.get("STUDY", "study"), "features.safetensors")


class Features(nn.Module):
    """uint8 (B, 3, 64, 64) -> (B, 64)."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for below, width in zip((3, *widths), widths):
            layers += [nn.Conv2d(below, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], DIM)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.float() / 127.5 - 1).mean((2, 3)))


def load() -> nn.Module:
    """The trained network."""
    network = Features()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def read_part(folder: Path) -> tuple[Tensor, Tensor]:
    """uint8 (N, 3, 72, 72) and labels (N,)."""
    rows = [json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()]
    images = np.stack([np.asarray(Image.open(folder / "train" / row["file_name"])) for row in rows])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([row["label"] for row in rows])


def windows(images: Tensor) -> Tensor:
    """One random window of each image, flipped at random, (B, 3, 64, 64)."""
    room = images.shape[-1] - SIDE + 1
    places = torch.randint(room, (len(images), 2)).tolist()
    cut = [image[:, top : top + SIDE, left : left + SIDE] for image, (top, left) in zip(images, places)]
    return torch.stack([part.flip(-1) if torch.rand(()) < 0.5 else part for part in cut])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held_out", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = read_part(args.data)
    network = Features()
    classify = nn.Linear(DIM, int(labels.max()) + 1)
    optimizer = torch.optim.AdamW([*network.parameters(), *classify.parameters()], lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=args.steps)
    for _ in (bar := trange(args.steps, mininterval=5)):
        chosen = torch.randint(len(images), (args.batch_size,))
        loss = F.cross_entropy(classify(network(windows(images[chosen]))), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    save_file(network.state_dict(), args.output)
    network.eval()
    with torch.no_grad():
        others, theirs = read_part(args.held_out)
        centre = (others.shape[-1] - SIDE) // 2
        others = others[:, :, centre : centre + SIDE, centre : centre + SIDE]
        answers = torch.cat([classify(network(part)) for part in others.split(128)]).argmax(1)
    right = (answers == theirs).float().mean()
    print(f"{args.output}: {right:.1%} of {len(theirs)} crops from places not seen are told apart rightly")


if __name__ == "__main__":
    main()
