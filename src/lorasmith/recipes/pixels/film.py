"""Watch a policy play, and keep it as a GIF: the game, and what the autoencoder makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from lorasmith.recipes.pixels.autoencoder import Decoder, Encoder
from lorasmith.recipes.pixels.games import make_game

PAPER, INK, SOFT = (255, 255, 255), (27, 36, 48), (107, 118, 133)
PICTURE, EDGE, HEAD = 240, 16, 44
FRAME_MS = 90
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Episode:
    """`frames` is uint8 (count, channels, side, side); `scores` is the return up to each."""

    frames: Tensor
    scores: list[float]


def watch(policy: ActorCriticPolicy, game: str, *, seed: int, most_frames: int) -> Episode:
    """Play one episode as in training: actions are drawn from the policy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        env = make_game(game)
        frame, _ = env.reset(seed=seed)
        frames, totals, is_over = [frame], [0.0], False
        while not is_over and len(frames) < most_frames:
            action, _ = policy.predict(frame)
            frame, reward, ended, cut, _ = env.step(int(action))
            frames.append(frame)
            totals.append(totals[-1] + float(reward))
            is_over = ended or cut
        env.close()
    return Episode(torch.from_numpy(np.stack(frames)), totals)


@torch.no_grad()
def redraw(frames: Tensor, encoder: Encoder, decoder: Decoder) -> Tensor:
    """What the autoencoder makes of uint8 frames, as uint8 frames."""
    drawn: Tensor = decoder(encoder(frames.float() / 255)).clamp(0, 1)
    return (drawn * 255).round().to(torch.uint8)


def picture(frame: Tensor) -> Picture:
    """(side, side, 3): a colour frame as it is, of a stack of grey frames the latest."""
    shown = frame if frame.shape[0] == 3 else frame[-1:].expand(3, -1, -1)
    return np.ascontiguousarray(shown.permute(1, 2, 0).numpy())


def save_film(episode: Episode, redrawn: Tensor, path: Path, *, title: str) -> None:
    """Write the GIF: left the game, right the autoencoder's drawing of the same frame."""
    pairs = zip(episode.frames, redrawn, episode.scores, strict=True)
    images = [_sheet(left, right, score, title) for left, right, score in pairs]
    palette = images[len(images) // 2].quantize(64)
    frames = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    pauses = [FRAME_MS] * (len(frames) - 1) + [1500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pauses, loop=0, optimize=True)


def _sheet(left: Tensor, right: Tensor, score: float, title: str) -> Image.Image:
    sheet = Image.new("RGB", (2 * PICTURE + 3 * EDGE, HEAD + PICTURE + EDGE + 22), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((EDGE, 14), title, INK, _font(15))
    draw.text((sheet.width - EDGE, 14), f"return {score:g}", INK, _font(15), anchor="ra")
    captions = ("the game, as the policy sees it", "the autoencoder's drawing of it")
    for k, (frame, caption) in enumerate(zip((left, right), captions, strict=True)):
        x = EDGE + k * (PICTURE + EDGE)
        shown = Image.fromarray(picture(frame)).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
        sheet.paste(shown, (x, HEAD))
        draw.text((x, HEAD + PICTURE + 8), caption, SOFT, _font(13))
    return sheet


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
