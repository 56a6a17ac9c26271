"""Draw threads for teaching the demo's model: cords, loops, cloth stitch and meshes laid over one another at random.

It is what lace is made of, of all widths, colours and sizes, but never lace: no motif, no repeat of one, no edge.
`python -m demo.making.draw_threads SHEET.png` draws a sheet of them.
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.making.draw_textiles import (
    ALL_OVER,
    COLOURS,
    SIDE,
    SUPERSAMPLING,
    Canvas,
    Textile,
    band,
    cord,
    dye,
    flower,
    lattice,
    leaf,
    lit,
    rotate,
    sheet,
    tile,
    weave,
)

LAYERS = 4


def draw(count: int, seed: int, device: str | torch.device = "cpu") -> tuple[Tensor, list[Textile]]:
    """`count` pictures of threads, uint8 (count, 3, SIDE, SIDE), and what each shows."""
    canvas = Canvas(count, seed, device)
    relief = torch.zeros_like(canvas.x)
    for _ in range(LAYERS):
        relief = torch.maximum(relief, layer(canvas))
    mask = (relief > 0).float()
    thread, ground = lit(relief, mask)
    colours = [canvas.choices.choice(["white"] * 20 + list(COLOURS)) for _ in range(count)]
    dark = ["black", "navy", "brown", "green", "purple", "grey"]
    grounds = [canvas.choices.choice([name for name in (*dark, *COLOURS) if name != colour]) for colour in colours]
    light = torch.where(canvas.coin(0.1), 1 - mask * 0.6, thread * mask + ground * (1 - mask))
    cloth = 1 + canvas.uniform(0, 0.07) * canvas.noise(SIDE // 2) + canvas.noise(3) * 0.05
    warm = torch.ones(count, 3, 1, 1, device=canvas.device)
    warm[:, 1:] -= canvas.uniform(0, 1)[..., None] * torch.tensor([0.05, 0.17], device=canvas.device).view(2, 1, 1)
    picture = (
        warm
        * (dye(canvas, colours) * mask[:, None] + dye(canvas, grounds) * (1 - mask)[:, None])
        * (light * cloth)[:, None]
    )
    pixels = (F.avg_pool2d(picture.clamp(0, 1), SUPERSAMPLING) * 255).round().to(torch.uint8)
    return pixels, [
        Textile("threads", colour, ground, "cotton", 0.5, "", "solid", ALL_OVER)
        for colour, ground in zip(colours, grounds, strict=True)
    ]


def layer(canvas: Canvas) -> Tensor:
    """Height in pixels (n, s, s) of one layer: lines of one kind, everywhere or in a part of the picture."""
    turned = rotate(canvas.x + canvas.uniform(-90, 90), canvas.y + canvas.uniform(-90, 90), canvas.uniform(0, math.tau))
    sway = canvas.uniform(0, 9) * canvas.coin(0.6)
    x, y = (u + sway * torch.sin(v / canvas.uniform(14, 40)) for u, v in (turned, turned[::-1]))
    period = 9 * 9 ** canvas.uniform(0, 1)
    radius = 0.6 * 6 ** canvas.uniform(0, 1)
    kind = canvas.whole(0, 7)
    lines = torch.where(kind == 0, tile(x, period)[0].abs(), torch.full_like(x, 1e3))
    meshes = torch.minimum(tile(x, period)[0].abs(), tile(y, period)[0].abs())
    u, v, chance = lattice(x, y, period, canvas.coin(0.5))
    loops = (torch.hypot(u, v) - canvas.uniform(0.2, 0.55) * period).abs()
    small = canvas.uniform(4, 9)  # loops in rows, as picots
    picots = (torch.hypot(tile(x, small * canvas.uniform(1.2, 3))[0], tile(y, period)[0]) - small / 2).abs()
    level = canvas.noise(10) * canvas.uniform(0.5, 2)
    slope_y, slope_x = torch.gradient(level, dim=(1, 2))
    steep = torch.hypot(slope_x, slope_y).clamp(min=1e-3) * SUPERSAMPLING
    curls = (level - torch.round(level)).abs() / steep
    for number, across in ((1, meshes), (2, loops), (3, picots), (4, curls)):
        lines = torch.where(kind == number, across, lines)
    blade = leaf(*rotate(u, v, chance * math.tau), period * 0.45, canvas.uniform(0.25, 0.9))
    petals = flower(canvas, u, v, period * 0.47, chance)
    shape = torch.where(kind == 5, blade, torch.where(kind == 6, petals, (level - canvas.uniform(-0.3, 0.8)) / steep))
    open_lines, filled = (
        cord(radius - lines, radius),
        torch.maximum(cord(radius - shape.abs(), radius), weave(canvas, x, y, radius) * (shape > 0) * canvas.coin(0.8)),
    )
    height = torch.where(kind < 5, open_lines, filled)
    part = torch.where(canvas.coin(0.5), canvas.noise(5), band(canvas.x + canvas.y, canvas.uniform(90, 300), 0.6))
    twist = 0.93 + 0.12 * torch.sin((x + y) / radius).abs()
    lift = canvas.uniform(0, 3)
    return torch.where((part > 0) | canvas.coin(0.45), torch.where(height > 0, height * twist + lift, 0.0), 0.0)


if __name__ == "__main__":
    sheet(draw(48, 0)[0], 8).save(sys.argv[1])
