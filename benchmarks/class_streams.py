"""What the class-incremental benchmark learns from: an encoder, classes it was not made for, views of an example."""

import hashlib
import json
import lzma
from collections import defaultdict
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer


class Images:
    """Thirty classes of images of 8 by 8 for a perceptron of three layers that was pretrained on twenty others.

    It is pretrained on half of the images, upright and turned by 180 degrees. The classes are the other half, turned by
    90 degrees, inverted and mirrored, and with quadrants swapped.

    Args:
        images: from 0 to 1, shape (N, 8, 8).
        labels: ten kinds of them, shape (N,).

    Attributes:
        tasks: how many come one after the other.
        per_task: classes in each.
        train: examples of a class to learn from.
        test: examples of it to ask about.
        of_class: per class its examples.
        encoder: weights to begin with.
        digest: tells these data and this encoder from others.
        told: figures for the report.
    """

    tasks, per_task, train, test, width = 6, 5, 40, 30, 64

    def __init__(self, images: Tensor, labels: Tensor):
        self.digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        self.encoder, accuracy = self._pretrained(images, labels)
        self.told = {"pretrained_accuracy": accuracy}
        half = len(images) // 2
        kinds = [images.rot90(1, (1, 2)), 1 - images.flip(2), images.roll((4, 4), (1, 2))]
        x = torch.cat([kind[half:] for kind in kinds])
        y = torch.cat([labels[half:] + 10 * number for number in range(3)])
        self.of_class = {label: x[y == label] for label in range(30)}

    def new_encoder(self) -> nn.Module:
        """An encoder without the weights."""
        layers = [nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU()]
        return nn.Sequential(*layers, nn.LayerNorm(128), nn.Linear(128, self.width))

    def views(self, images_B88: Tensor, draws: torch.Generator) -> Tensor:
        """Two views of an image differ in where it stands and in noise."""
        return shifted(images_B88, draws)

    def _pretrained(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], float]:
        """An encoder of the first half of the images, and its accuracy on the second."""
        torch.manual_seed(0)
        draws, half = torch.Generator().manual_seed(0), len(images) // 2
        x, y = torch.cat([images, images.rot90(2, (1, 2))]), torch.cat([labels, labels + 10])
        number = torch.arange(len(images)).repeat(2)
        encoder, head = self.new_encoder(), nn.Linear(self.width, 20)
        optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
        train = (number < half).nonzero()[:, 0]
        for _ in range(30):
            for part in train[torch.randperm(len(train), generator=draws)].split(64):
                optimizer.zero_grad()
                F.cross_entropy(head(encoder(self.views(x[part], draws))), y[part]).backward()
                optimizer.step()
        with torch.no_grad():
            right = head(encoder(x[number >= half])).argmax(1) == y[number >= half]
        return encoder.state_dict(), right.float().mean().item()


def shifted(images_B88: Tensor, draws: torch.Generator) -> Tensor:
    """Each image shifted by up to a pixel in both directions, with noise."""
    padded = F.pad(images_B88, (1, 1, 1, 1))
    down, right = torch.randint(3, (2, len(padded), 1, 1), generator=draws)
    rows, columns = down + torch.arange(8)[:, None], right + torch.arange(8)
    moved = padded[torch.arange(len(padded))[:, None, None], rows, columns]
    return moved + 0.05 * torch.randn(moved.shape, generator=draws)


def read_digits(path: Path) -> tuple[Tensor, Tensor]:
    """1,797 images of 8 by 8, from 0 to 1, and their digits."""
    table = torch.from_numpy(numpy.loadtxt(path, delimiter=","))
    return (table[:, :64] / 16).float().view(-1, 8, 8), table[:, 64].long()


def drawn_shapes(per_class: int = 180) -> tuple[Tensor, Tensor]:
    """Ten smooth random shapes, each image of one shifted, dimmed and with noise."""
    draws = torch.Generator().manual_seed(0)
    coarse = torch.rand(10, 1, 4, 4, generator=draws)
    shapes = (F.interpolate(coarse, size=8, mode="bilinear")[:, 0] - 0.35).clamp(min=0) * 1.6
    labels = torch.arange(10).repeat_interleave(per_class)[torch.randperm(10 * per_class, generator=draws)]
    light = 0.6 + 0.4 * torch.rand(len(labels), 1, 1, generator=draws)
    noise = 0.25 * torch.randn(len(labels), 8, 8, generator=draws)
    return (shifted(shapes[labels], draws) * light + noise).clamp(0, 1), labels


class Texts:
    """The most frequent subjects of a collection of articles, for a pretrained decoder whose states are averaged.

    An example is the beginning of an article, twice as many tokens as a view, which is a window of it. Attributes are
    those of ``Images``.

    Args:
        path: JSON Lines, may be compressed (.xz), each with a ``text`` and its ``subjects``, of which the first counts
            ("Birds; Pets").
        folder: of the decoder and its tokenizer.
        length: tokens of a view.

    Raises:
        ValueError: a line has no text or subject, or too few subjects have enough articles that are long enough.
    """

    tasks, per_task, train, test = 5, 5, 40, 20

    def __init__(self, path: Path, folder: Path, length: int = 64):
        self._length, self._config = length, AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        articles = defaultdict(list)
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    told = json.loads(line)
                    subject, text = told["subjects"].split(";")[0].strip(), told["text"]
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(f"{path}:{number}: not an object with a text and its subjects") from None
                if len(ids := tokenizer(text[: 40 * length])["input_ids"]) >= 2 * length:
                    articles[subject].append(ids[: 2 * length])
        enough = {name: found for name, found in articles.items() if len(found) >= self.train + self.test}
        wanted = self.tasks * self.per_task
        if len(enough) < wanted:
            raise ValueError(
                f"{path}: {len(enough)} subjects have {self.train + self.test} articles of {2 * length} tokens, "
                f"{wanted} are needed"
            )
        most = sorted(enough, key=lambda name: (-len(enough[name]), name))[:wanted]
        self.of_class = {label: torch.tensor(enough[name]) for label, name in enumerate(most)}
        decoder = MeanStates(AutoModel.from_pretrained(folder, dtype=torch.float32))
        self.encoder, self.width = decoder.state_dict(), decoder.width
        digest = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in self.of_class.values()))
        for tensor in self.encoder.values():
            digest.update(tensor.numpy().tobytes())
        self.digest, self.told = digest.hexdigest(), {"subjects": most}

    def new_encoder(self) -> nn.Module:
        """The decoder without its weights, to be called on token ids."""
        return MeanStates(AutoModel.from_config(self._config)).eval()

    def views(self, ids_BL: Tensor, draws: torch.Generator) -> Tensor:
        """Of each beginning a window."""
        first_B1 = torch.randint(ids_BL.shape[1] - self._length + 1, (len(ids_BL), 1), generator=draws)
        return ids_BL.gather(1, first_B1 + torch.arange(self._length))


class MeanStates(nn.Module):
    """A decoder's last hidden states, averaged over the tokens of each text, as ``memlayer.methods.features`` has them.

    Args:
        decoder: a transformers model without a head.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder, self.width = decoder, decoder.config.get_text_config().hidden_size

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Shape (B, width)."""
        return self.decoder(input_ids=ids_BL, use_cache=False).last_hidden_state.mean(1)
