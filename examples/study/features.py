"""The study's feature network: it tells emoji from each other; its 64 activations are the features for the metrics.

It is trained on the emoji without a skin tone, moved, scaled and recoloured a little, but neither blurred nor
sharpened: how sharp a picture is shall count. Fréchet distances on these features compare models of this study only.

    python examples/study/features.py

With `python -m lpl.evaluate`, use `--features examples.study.features:load`.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from make_data import DATA, read_pictures


DIM = 64
CLASSES = 1573  # different captions
WEIGHTS = Path(__file__).with_suffix(".safetensors")


class Features(nn.Module):
    """uint8 (B, 3, 96, 96) -> (B, 64)."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for below, width in zip((3, *widths), widths):
            layers += [nn.Conv2d(below, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(9 * widths[-1], DIM)
        self.classify = nn.Linear(DIM, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.body(images.float() / 127.5 - 1), 3).flatten(1))

    def texture(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, 96, 96) -> (B, 96): mean and standard deviation of each channel after the second convolution.

        Edges and shades count here, and what is shown does not.
        """
        maps = self.body[:4](images.float() / 127.5 - 1)
        return torch.cat([maps.mean((2, 3)), maps.std((2, 3))], 1)

    def named(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, 96, 96) -> numbers of captions (B,), in alphabetical order."""
        return self.classify(self(images)).argmax(1)


def load() -> Features:
    """The trained network."""
    network = Features()
    network.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS).items()})
    return network.eval()


def places_of(captions: list[str]) -> dict[str, int]:
    """Each caption's place in the alphabetical order of all."""
    return {caption: place for place, caption in enumerate(sorted(set(captions)))}


def changed(images: Tensor) -> Tensor:
    """Moves, scales and recolours each image at random; uint8 (B, 3, H, W) -> [0, 255]."""
    count = len(images)
    scale, shift = torch.empty(count).uniform_(-0.15, 0.15).exp(), torch.empty(count, 2).uniform_(-0.12, 0.12)
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = scale
    transform[:, :, 2] = shift
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    moved = 255 - F.grid_sample(255 - images.float(), grid, align_corners=False)  # white outside
    return (moved * torch.empty(count, 3, 1, 1).uniform_(0.9, 1.1)).clamp(0, 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "plain", help="folder with a Parquet file of make_data.py")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    images, captions = read_pictures(args.data)
    places, network = places_of(captions), Features()
    numbers = torch.tensor([places[caption] for caption in captions])
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    for step in (bar := trange(args.steps, mininterval=5)):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        chosen = torch.randint(len(images), (args.batch_size,))
        logits = network.classify(network(changed(images[chosen])))
        loss = F.cross_entropy(logits, numbers[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    save_file({name: weight.half() for name, weight in network.state_dict().items()}, args.output)
    network = load()
    with torch.no_grad():
        for words, pictures in (("as they are", images), ("changed", changed(images).byte())):
            named = torch.cat([network.named(part) for part in pictures.split(128)])
            print(f"{args.output}: {(named == numbers).float().mean():.1%} of the pictures {words} are recognised")


if __name__ == "__main__":
    main()
