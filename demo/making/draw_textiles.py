"""Draw captioned textiles for training the demo's base model: stripes, dots, flowers and the like, but no lace.

A pattern goes all over the cloth, or fills a border, a band or a round medallion with a straight or scalloped
edge; but a net never has an edge, since a net with flowers and a scalloped edge is what lace is.

`python -m demo.making.draw_textiles SHEET.png` draws a sheet of all patterns. Many pictures are drawn at
once, on any device. A pattern is a signed distance: for every pixel how far inside the figure it
lies, in pixels, negative outside. So the same pattern can be filled, outlined, embroidered or corded.
"""

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 256  # of a picture, in pixels
SUPERSAMPLING = 2
COLOURS = {
    "red": (0.80, 0.10, 0.12), "orange": (0.95, 0.50, 0.10), "yellow": (0.96, 0.84, 0.20), "green": (0.16, 0.58, 0.24),
    "teal": (0.08, 0.55, 0.58), "blue": (0.15, 0.38, 0.85), "navy": (0.08, 0.12, 0.36), "purple": (0.48, 0.18, 0.62),
    "pink": (0.96, 0.55, 0.70), "brown": (0.45, 0.27, 0.14), "grey": (0.52, 0.52, 0.54), "black": (0.07, 0.07, 0.08),
    "white": (0.95, 0.95, 0.93),
}  # fmt: skip
ALIKE = ({"navy", "black"}, {"navy", "blue"}, {"green", "teal"}, {"red", "orange"})  # never side by side
MATERIALS = ("cotton", "linen", "silk", "wool")
ALL_OVER = "all over"
LAYOUTS = tuple(edge + place for edge in ("", "scalloped ") for place in ("border", "band", "medallion"))
DIRECTIONS = {"vertical": 0.0, "horizontal": math.pi / 2, "diagonal": math.pi / 4}
LIGHT = (-0.55, -0.75)  # where the light comes from: the upper left


@dataclass(frozen=True)
class Textile:
    """What one picture shows."""

    pattern: str
    colour: str
    ground: str
    material: str
    size: float  # 0 is small, 1 is large
    direction: str  # of stripes; empty when any
    figure: str
    layout: str
    original: tuple[int, int] = (SIDE, SIDE)  # height and width of the photo, which may be smaller than SIDE
    crop: tuple[int, int] = (0, 0)  # top and left of the picture in that photo, once its shorter side is SIDE

    @property
    def colours(self) -> set[str]:
        return {self.colour} if self.pattern == "plain" else {self.colour, self.ground}


class Canvas:
    """`count` pictures drawn at once. A number drawn by lot is a tensor (count, 1, 1), an image (count, n, n)."""

    def __init__(self, count: int, seed: int, device: str | torch.device) -> None:
        self.count, self.device, self.extent = count, device, SIDE * SUPERSAMPLING
        self.generator = torch.Generator(device).manual_seed(seed)
        self.choices = random.Random(seed)
        pixels = (torch.arange(self.extent, device=device) + 0.5) / SUPERSAMPLING - SIDE / 2
        self.x, self.y = pixels.expand(count, self.extent, -1), pixels[:, None].expand(count, -1, self.extent)

    def uniform(self, low: float, high: float) -> Tensor:
        return torch.rand(self.count, 1, 1, generator=self.generator, device=self.device) * (high - low) + low

    def whole(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (self.count, 1, 1), generator=self.generator, device=self.device).float()

    def coin(self, share: float) -> Tensor:
        return self.uniform(0, 1) < share

    def noise(self, cells: int) -> Tensor:
        """Smooth noise of about unit variance, its hills `SIDE / cells` pixels wide."""
        grid = torch.randn(self.count, 1, cells, cells, generator=self.generator, device=self.device)
        return F.interpolate(grid, size=self.extent, mode="bicubic", align_corners=False)[:, 0]

    def where(self, values: Sequence[object], wanted: object = True) -> Tensor:
        """Which of the pictures have the `wanted` value, as (count, 1, 1)."""
        return torch.tensor([value == wanted for value in values], device=self.device).view(-1, 1, 1)


# --- patterns: each a function of canvas, coordinates and period in pixels to a signed distance (n, s, s)


def stripes(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    return band(x, period, canvas.uniform(0.35, 0.65))


def checks(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    across, down = band(x, period, 0.5), band(y, period, 0.5)
    return torch.where(across * down > 0, 1.0, -1.0) * torch.minimum(across.abs(), down.abs())


def dots(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    x, y, _ = lattice(x, y, period, canvas.coin(0.6))
    return canvas.uniform(0.22, 0.36) * period - torch.hypot(x, y)


def rings(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    x, y, _ = lattice(x, y, period, canvas.coin(0.5))
    return canvas.uniform(0.03, 0.09) * period - (torch.hypot(x, y) - canvas.uniform(0.28, 0.38) * period).abs()


def chevrons(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    return band(y + triangle(x / (period * 1.2)) * period * canvas.uniform(0.4, 0.7), period, 0.5)


def herringbone(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    x, column = tile(x, period)
    twill = band(y + torch.where(column % 2 > 0, x, -x), period * canvas.uniform(0.4, 0.5), 0.55)
    return torch.minimum(twill, period * 0.46 - x.abs())


def houndstooth(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Four light and four dark threads in both directions, woven as a two-and-two twill."""
    warp, weft = torch.floor(x / period * 8), torch.floor(y / period * 8)
    over = (warp + weft) % 4 < 2
    return torch.where(over, (warp % 8 < 4).float(), (weft % 8 < 4).float()) * 4 - 2


def flowers(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    period = period * 1.35
    x, y, chance = lattice(x, y, period, canvas.coin(0.8))
    return flower(canvas, x, y, period * canvas.uniform(0.36, 0.46), chance)


def damask(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """A net of pointed ovals with a four-petalled ornament in each."""
    wide, high = period * 1.5, period * 2.1
    net = canvas.uniform(0.06, 0.1) * period - ((triangle(x / wide) + triangle(y / high) - 1) * wide / 3).abs()
    figure = torch.full_like(net, -1e3)
    for shift in (0.0, 0.5):
        u, v = tile(x + shift * wide, wide)[0], tile(y + shift * high, high)[0] * 0.71
        reach, angle = torch.hypot(u, v), torch.atan2(v, u)
        petals = wide * 0.27 * (0.5 + 0.5 * torch.cos(2 * angle).abs()) - reach
        figure = torch.maximum(figure, torch.minimum(petals, reach - wide * 0.06))
    return torch.maximum(net, figure)


def basket_weave(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Three threads over three, the upright ones of one colour and the level ones of the other."""
    upright = (tile(x, period / 2)[1] + tile(y, period / 2)[1]) % 2 > 0
    threads = band(torch.where(upright, x, y), period / 6, 0.78)
    return torch.where(upright, threads, -threads)


def net(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """A net of square, diagonal or six-sided meshes, knotted or not."""
    mesh, diagonal = period * 0.9, canvas.coin(0.5)
    a, b = torch.where(diagonal, (x + y) * 0.7071, x), torch.where(diagonal, (x - y) * 0.7071, y)
    across, down = mesh / 2 - tile(a, mesh)[0].abs(), mesh / 2 - tile(b, mesh)[0].abs()
    thread = canvas.uniform(0.03, 0.08) * mesh + 0.5
    knots = torch.where(canvas.coin(0.5), 2 * thread - torch.hypot(across, down), -1e3)
    square = torch.maximum(thread - torch.minimum(across, down), knots)
    return torch.where(canvas.coin(0.35), thread - to_hexagon(x, y, mesh * 1.1), square)


def trellis(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Thin crossing lines with a flower where every other pair of them crosses."""
    mesh = period * 1.1
    a, b = (x + y) * 0.7071, (x - y) * 0.7071
    lines = canvas.uniform(0.8, 1.8) - (mesh / 2 - torch.maximum(tile(a, mesh)[0].abs(), tile(b, mesh)[0].abs()))
    (u, column), (v, row) = tile(a + mesh / 2, mesh), tile(b + mesh / 2, mesh)
    blossom = flower(canvas, u, v, mesh * canvas.uniform(0.42, 0.7), torch.zeros_like(u))
    everywhere = canvas.coin(0.3)
    return torch.maximum(lines, torch.where(everywhere | ((row + column) % 2 > 0), blossom, -1e3))


def vines(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Winding stems with leaves to the left and right, in turn."""
    spacing, length = period * 1.5, period * canvas.uniform(2.2, 3.2)
    swing = period * canvas.uniform(0.1, 0.3)
    v, row = tile(y + swing * torch.sin(math.tau * x / length), spacing)
    stem = canvas.uniform(0.03, 0.06) * period + 0.4 - v.abs()
    step, reach = period * canvas.uniform(0.5, 0.7), period * canvas.uniform(0.3, 0.36)
    side = torch.where(v > 0, 0.0, 0.5)
    u = tile(x + (side + row * 0.37) * step, step)[0]
    u, w = rotate(u, v.abs() - reach * 0.85, torch.full_like(period, -0.6))
    return torch.maximum(stem, leaf(w, u, reach, canvas.uniform(0.35, 0.55)))


def paisley(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Drops with a bent tip, turned the other way in every other row."""
    period = period * 1.5
    x, y, _ = lattice(x, y, period, canvas.coin(1.0))
    reach, drop = period * 0.4, torch.full_like(x, -1e3)
    for share in (0.0, 0.12, 0.25, 0.38, 0.5, 0.62, 0.75, 0.88, 1.0):
        bend, fall = 0.9 * share**2 - 0.25, 1.35 * share - 0.35
        radius = 0.62 * (1 - share) ** 0.8 + 0.03
        drop = torch.maximum(drop, reach * radius - torch.hypot(x - bend * reach, y - fall * reach))
    eye = reach * 0.2 - torch.hypot(x + 0.25 * reach, y + 0.35 * reach)
    return torch.minimum(drop, -torch.minimum(drop - 0.14 * reach, 0.3 * reach - drop)).minimum(-eye)


def plain(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    return torch.full_like(x, 1e3)


def diamonds(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    x, y = tile(x, period)[0].abs(), tile(y, period * 1.4)[0].abs()
    return (canvas.uniform(0.38, 0.5) - x / period - y / (period * 1.4)) * period * 0.8


def waves(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    swing = torch.sin(math.tau * x / (period * canvas.uniform(1.4, 2.2))) * period * canvas.uniform(0.25, 0.5)
    return band(y + swing, period, canvas.uniform(0.3, 0.5))


def leaves(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Pointed leaves with a midrib, each turned its own way."""
    x, y, chance = lattice(x, y, period * 1.1, canvas.coin(0.7))
    x, y = rotate(x, y, chance * math.tau)
    return leaf(x, y, period * canvas.uniform(0.42, 0.5), canvas.uniform(0.3, 0.6))


def swirls(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Thin lines along the contours of a hilly field, as a thread laid in curls."""
    field = torch.where(canvas.coin(0.5), canvas.noise(6), canvas.noise(12) * 0.5)
    field = field * canvas.uniform(1.0, 2.4) + (x + y) / period * 0.3
    slope_y, slope_x = torch.gradient(field, dim=(1, 2))
    steepness = torch.hypot(slope_x, slope_y) * SUPERSAMPLING
    across = (field - torch.round(field)).abs() / steepness.clamp(min=1e-3)
    return canvas.uniform(0.7, 2.0) - across


def tartan(canvas: Canvas, x: Tensor, y: Tensor, period: Tensor) -> Tensor:
    """Bands across and down, mixed half and half where one of them runs alone: so a share, not a distance."""
    bands, lines = (
        [coverage(band(u + shift * period, period, share)) for u in (x, y)] for shift, share in ((0, 0.45), (0.5, 0.1))
    )
    mixed = (sum(bands) + 0.7 * torch.maximum(*lines)) / 2
    return mixed.clamp(0, 1)


Pattern = Callable[[Canvas, Tensor, Tensor, Tensor], Tensor]
PATTERNS: dict[str, Pattern] = {
    function.__name__.replace("_", " "): function
    for function in (
        stripes, checks, tartan, dots, rings, chevrons, herringbone, houndstooth, flowers, damask, basket_weave, net,
        paisley, plain, diamonds, waves, leaves, swirls, trellis, vines,
    )
}  # fmt: skip
ADJECTIVES = {
    "stripes": "striped", "checks": "checked", "tartan": "tartan", "dots": "dotted", "rings": "ringed",
    "chevrons": "chevron", "flowers": "floral", "diamonds": "diamond", "waves": "wavy", "leaves": "leafy",
    "swirls": "swirling", "vines": "vine",
}  # fmt: skip
CAN_BE_OUTLINED = ("dots", "flowers", "damask", "paisley", "diamonds", "leaves")
CAN_BE_EMBROIDERED = (*CAN_BE_OUTLINED, "rings", "waves", "net", "swirls", "chevrons", "trellis", "vines")
# Corded, these are cords themselves; others have a cord round them.
MOSTLY_LINES = ("rings", "net", "swirls", "trellis", "vines")
SMALL_PHOTOS = (96, 128, 176)  # shorter sides of photos that are enlarged, and so are not sharp
EDGELESS = ("net", "trellis", "tartan", "plain")
FINE = ("net", "swirls", "leaves", "herringbone", "rings", "flowers", "trellis", "vines", "threads")


# --- motifs


def flower(canvas: Canvas, x: Tensor, y: Tensor, radius: Tensor, chance: Tensor) -> Tensor:
    """Petals round an eyelet, lobed or parted from one another, turned by `chance` of a circle."""
    reach, angle = torch.hypot(x, y), torch.atan2(y, x) + chance * math.tau
    turns = canvas.whole(5, 9) * angle / 2
    lobed = radius * (0.7 + 0.3 * torch.cos(2 * turns)) - reach
    gap = torch.sin(turns).abs() * reach / 4 - canvas.uniform(0.4, 1.0)
    petals = torch.minimum(radius * torch.sin(turns).abs() ** 0.5 - reach, gap)
    heart = (reach - radius * 0.22).abs() - radius * 0.07
    return torch.where(canvas.coin(0.5), lobed, petals).minimum(heart)


def leaf(x: Tensor, y: Tensor, half: Tensor, bow: Tensor) -> Tensor:
    """A pointed blade along y, `half` pixels from its middle to a tip, with a midrib; `bow` 1 would be a circle."""
    radius = half * (1 + bow**2) / (2 * bow)
    blade = radius - torch.hypot(x.abs() + radius - half * bow, y)
    return torch.minimum(blade, x.abs() - half * 0.05 - 0.2)


# --- layouts


def lay_out(canvas: Canvas, layouts: Sequence[str], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Signed distance to the place that the pattern fills, and the coordinates it has there."""
    is_straight, is_round = (
        canvas.where([layout.endswith(names) for layout in layouts]) for names in (("border", "band"), "medallion")
    )
    depth = canvas.uniform(8, 22) * canvas.where(["scalloped" in layout for layout in layouts])
    quarter = canvas.whole(0, 3) * math.pi / 2 + canvas.coin(0.3) * canvas.uniform(-0.5, 0.5)
    u, v = rotate(canvas.x, canvas.y, quarter + canvas.uniform(-0.06, 0.06))
    pitch = canvas.uniform(36, 90)
    scallops, others = (
        depth * torch.sin(math.pi * (u / pitch + shift)).abs() ** 0.8 for shift in (0, canvas.whole(0, 1) / 2)
    )
    half, sectors, shift = canvas.uniform(28, 76), canvas.whole(6, 12), canvas.uniform(-12, 12)
    reach, angle = torch.hypot(canvas.x + shift, canvas.y - shift), torch.atan2(canvas.y - shift, canvas.x + shift)
    lobes = depth * (torch.sin(sectors * angle / 2).abs() ** 0.8 - 0.5)
    places = {
        "border": canvas.uniform(-10, 70) + scallops - v,
        "band": torch.minimum(half + scallops - v, half + others + v),
        "medallion": canvas.uniform(70, 104) + lobes - reach,
    }
    place = torch.full_like(x, 1e3)
    for name, distance in places.items():
        place = torch.where(canvas.where([layout.endswith(name) for layout in layouts]), distance, place)
    follows = is_straight & canvas.coin(0.7)
    x, y = torch.where(follows, u, x), torch.where(follows, v, y)
    # Mirrored from sector to sector, as in a kaleidoscope.
    folded = triangle(angle * sectors / math.tau) * math.pi / sectors
    mirrored = is_round & canvas.coin(0.7)
    return (
        place,
        torch.where(mirrored, reach * torch.sin(folded), x),
        torch.where(mirrored, reach * torch.cos(folded), y),
    )


def rim(canvas: Canvas, place: Tensor) -> Tensor:
    """One cord along the edge of a place, or two, or none."""
    thick, gap = canvas.uniform(0.8, 4), canvas.uniform(6, 16)
    inner = torch.where(canvas.coin(0.5), canvas.uniform(0.6, 2) - (place - gap).abs(), -1e3)
    return torch.where(canvas.coin(0.8), torch.maximum(thick - place.abs(), inner), -1e3)


# --- geometry


def triangle(turns: Tensor) -> Tensor:
    """A wave from 0 to 1 and back within each turn."""
    return 1 - (2 * (turns - torch.floor(turns)) - 1).abs()


def band(u: Tensor, period: Tensor, share: Tensor | float) -> Tensor:
    """Signed distance to bands that take `share` of every period."""
    return (triangle(u / period) - (1 - share)) * period / 2


def tile(u: Tensor, period: Tensor) -> tuple[Tensor, Tensor]:
    """Offset from the middle of its tile, and the tile's number."""
    number = torch.floor(u / period)
    return u - (number + 0.5) * period, number


def lattice(x: Tensor, y: Tensor, period: Tensor, staggered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets from the middle of square tiles, rows staggered like bricks or not, and a number from 0 to 1 by tile."""
    y, row = tile(y, period)
    x, column = tile(x + (row % 2) * staggered * period / 2, period)
    return x, y, (torch.sin(column * 12.9898 + row * 78.233) * 43758.5453) % 1


def to_hexagon(x: Tensor, y: Tensor, across: Tensor) -> Tensor:
    """Distance to the nearest side of a honeycomb, whose cells are `across` pixels from side to side."""
    near, inside = torch.full_like(x, 1e9), x
    for shift in (0.0, 0.5):  # of the two lattices that the cells' middles make up, the nearer
        u, v = tile(x + shift * across, across)[0], tile(y + shift * across * 1.732, across * 1.732)[0]
        side = across / 2 - torch.maximum(u.abs(), (u.abs() + 1.732 * v.abs()) / 2)
        inside = torch.where(torch.hypot(u, v) < near, side, inside)
        near = torch.minimum(torch.hypot(u, v), near)
    return inside.clamp(min=0)


def rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cosine, sine = torch.cos(angle), torch.sin(angle)
    return cosine * x + sine * y, cosine * y - sine * x


def coverage(distance: Tensor) -> Tensor:
    """Share of each pixel that lies inside."""
    return (distance * SUPERSAMPLING * 0.8 + 0.5).clamp(0, 1)


# --- pictures


def draw(
    pattern: str, count: int, seed: int, device: str | torch.device = "cpu", **fixed: Any
) -> tuple[Tensor, list[Textile]]:
    """`count` pictures of one pattern, uint8 (count, 3, SIDE, SIDE), and what each shows; `fixed` sets its fields."""
    canvas = Canvas(count, seed, device)
    size = canvas.uniform(0, 1)
    textiles = [choose(canvas.choices, pattern, float(share), fixed) for share in size.flatten()]
    look_at(canvas, textiles)
    materials, figures = [textile.material for textile in textiles], [textile.figure for textile in textiles]
    x, y = warp(canvas, materials)
    place, x, y = lay_out(canvas, [textile.layout for textile in textiles], x, y)
    x, y = rotate(x, y, turn(canvas, textiles))
    x, y = x + canvas.uniform(0, 200), y + canvas.uniform(0, 200)
    distance = PATTERNS[pattern](canvas, x, y, 22 * (84 / 22) ** size)
    outlined = canvas.where(figures, "outlined")
    distance = torch.where(outlined, canvas.uniform(0.8, 1.8) - distance.abs(), distance)
    if pattern not in EDGELESS:
        distance = torch.maximum(torch.minimum(distance, place), rim(canvas, place))
    light = torch.ones_like(distance)
    if "embroidered" in figures:
        light = torch.where(canvas.where(figures, "embroidered"), stitch(canvas, distance, x, y), light)
    if "corded" in figures:
        is_corded, (distance, corded) = canvas.where(figures, "corded"), lay_cords(canvas, distance, x, y, pattern)
        light = torch.where(is_corded, corded, light)
    mask = distance if pattern == "tartan" else coverage(distance)
    colour, ground = (dye(canvas, [getattr(textile, field) for textile in textiles]) for field in ("colour", "ground"))
    cover = mask[:, None]
    picture = (ground * (1 - cover) + colour * cover) * (light * drape(canvas, materials))[:, None]
    pixels = F.avg_pool2d(picture.clamp(0, 1), SUPERSAMPLING)
    for side in SMALL_PHOTOS:
        small = torch.tensor([min(textile.original) == side for textile in textiles], device=device)
        if small.any():
            shrunk = F.interpolate(pixels[small], size=(side, side), mode="area")
            pixels[small] = F.interpolate(shrunk, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8), textiles


def choose(choices: random.Random, pattern: str, size: float, fixed: dict[str, Any]) -> Textile:
    colour = fixed.get("colour") or choices.choice([*COLOURS, "white", "white"])
    grounds = [name for name in COLOURS if name != colour and {name, colour} not in ALIKE]
    # Plain grounds more often than others, as in shops.
    grounds += [name for name in ("white", "white", "white", "black", "black") if name in grounds]
    figure = "solid"
    if pattern in CAN_BE_EMBROIDERED and choices.random() < 0.45:
        figure = choices.choice(["embroidered", "corded"])
    elif pattern in CAN_BE_OUTLINED and choices.random() < 0.3:
        figure = "outlined"
    layout = choices.choice(LAYOUTS) if pattern not in EDGELESS and choices.random() < 0.45 else ALL_OVER
    # In a border stripes follow the edge.
    direction = choices.choice([*DIRECTIONS, ""]) if pattern == "stripes" and layout == ALL_OVER else ""
    original, crop = choose_view(choices)
    fields: dict[str, Any] = {
        "colour": colour, "ground": choices.choice(grounds), "material": choices.choice(MATERIALS),
        "direction": direction, "figure": figure, "layout": layout, "original": original, "crop": crop,
    }  # fmt: skip
    return Textile(pattern=pattern, size=size, **(fields | fixed))


def choose_view(choices: random.Random) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of a photo, and top and left of the square picture in it at `SIDE` pixels."""
    short = choices.choice(SMALL_PHOTOS) if choices.random() < 0.2 else round(SIDE * 4 ** choices.random())
    long = round(short * choices.choice([1, choices.uniform(1, 1.7), choices.uniform(1.3, 1.7)]))
    room, lot = round(SIDE * long / short) - SIDE, choices.random()
    offset = 0 if lot < 0.25 else room // 2 if lot < 0.5 else choices.randint(0, room)
    return ((short, long), (0, offset)) if choices.random() < 0.5 else ((long, short), (offset, 0))


def look_at(canvas: Canvas, textiles: Sequence[Textile]) -> None:
    """Move the canvas, so that (0, 0) is the middle of each photo rather than of the picture cut from it."""
    for axis, name in enumerate("yx"):
        middles = [SIDE * t.original[axis] / min(t.original) / 2 - t.crop[axis] - SIDE / 2 for t in textiles]
        middle = torch.tensor(middles, device=canvas.device).view(-1, 1, 1)
        setattr(canvas, name, getattr(canvas, name) - middle)


def turn(canvas: Canvas, textiles: Sequence[Textile]) -> Tensor:
    """By how much each picture's pattern is turned, in radians."""
    pattern = textiles[0].pattern
    if pattern == "stripes":
        named = torch.tensor([DIRECTIONS.get(t.direction, 0.0) for t in textiles], device=canvas.device).view(-1, 1, 1)
        free = canvas.where([textile.direction for textile in textiles], "")
        return torch.where(free, canvas.uniform(0, math.pi), named + canvas.uniform(-0.06, 0.06))
    loose = pattern not in ("waves", "chevrons")  # which would become another pattern
    return canvas.uniform(-0.12, 0.12) + canvas.coin(0.25) * canvas.uniform(-0.8, 0.8) * loose


def warp(canvas: Canvas, materials: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The coordinates of cloth that does not lie quite flat; silk flows, wool is fuzzy."""
    sway = canvas.uniform(0, 5) * (canvas.coin(0.4) | canvas.where(materials, "silk"))
    x = canvas.x + sway * torch.sin(math.tau * canvas.y / canvas.uniform(90, 220) + canvas.uniform(0, 6))
    y = canvas.y + sway * torch.sin(math.tau * canvas.x / canvas.uniform(90, 220) + canvas.uniform(0, 6))
    fuzz = canvas.where(materials, "wool") * 0.7
    return x + fuzz * canvas.noise(64), y + fuzz * canvas.noise(64)


def drape(canvas: Canvas, materials: Sequence[str]) -> Tensor:
    """Light on the cloth: its weave, its sheen, and a lamp from one side."""
    cotton, linen, silk, wool = (canvas.where(materials, name).float() for name in MATERIALS)
    pitch = canvas.uniform(4, 5.5) * cotton + canvas.uniform(6, 8) * linen + 5 * (silk + wool)
    grain = torch.sin(math.tau * canvas.x / pitch) + torch.sin(math.tau * canvas.y / pitch)
    weave = grain * (0.025 * cotton + 0.045 * linen + 0.015 * wool)
    fibre = canvas.noise(96) * 0.06 * wool + canvas.noise(40) * 0.03 * linen
    slope = canvas.x * canvas.uniform(-0.03, 0.03) + canvas.y * canvas.uniform(-0.03, 0.03)
    sheen = torch.sin(slope + canvas.noise(4)) * 0.14 * silk
    lamp = (canvas.x * canvas.uniform(-1, 1) + canvas.y * canvas.uniform(-1, 1)) / SIDE * 0.12
    return 1 + weave + fibre + sheen + lamp + canvas.noise(3) * 0.04


def stitch(canvas: Canvas, distance: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Light on a raised figure: a bevel lit from the upper left, thread by thread, and its shadow on the ground."""
    height = canvas.uniform(1.2, 2.4)
    relief = F.avg_pool2d(distance.clamp(min=0).minimum(height)[:, None], 3, 1, 1)[:, 0]
    slope_y, slope_x = (slope * SUPERSAMPLING for slope in torch.gradient(relief, dim=(1, 2)))
    bevel = 1 - 0.35 * (slope_x * -LIGHT[0] + slope_y * -LIGHT[1])
    across, _ = rotate(x, y, canvas.uniform(0, math.pi))
    threads = 0.92 + 0.13 * torch.sin(math.tau * across / canvas.uniform(2.2, 3.4))
    drop = SUPERSAMPLING * 2
    blurred = F.avg_pool2d(coverage(distance)[:, None], 4 * drop + 1, 1, 2 * drop)[:, 0]
    shadow = 1 - 0.5 * torch.roll(blurred, (drop, drop), (1, 2))
    return torch.where(distance > 0, bevel * threads, shadow)


def lay_cords(canvas: Canvas, distance: Tensor, x: Tensor, y: Tensor, pattern: str) -> tuple[Tensor, Tensor]:
    """A pattern as a round cord along its edge, filled with cloth stitch or not: its signed distance, and the light."""
    radius = canvas.uniform(1.2, 3)
    relief = cord(distance, radius)
    if pattern not in MOSTLY_LINES:
        is_filled = canvas.coin(0.6)
        stitches = torch.where(is_filled & (distance > 0), weave(canvas, x, y, radius), 0.0)
        edge = radius - distance.abs()
        relief = torch.maximum(cord(edge, radius), stitches)
        distance = torch.where(is_filled, torch.maximum(edge, distance), edge)
    mask = coverage(distance)
    thread, ground = lit(relief, mask)
    return distance, thread * mask + ground * (1 - mask)


def cord(inside: Tensor, radius: Tensor) -> Tensor:
    """Height in pixels of a round cord, from the signed distance to its edge; 0 outside."""
    depth = inside.clamp(min=0).minimum(radius)
    return (depth * (2 * radius - depth)).sqrt()


def weave(canvas: Canvas, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Height in pixels of cloth stitch: threads of about a pixel's radius side by side, and one to and fro."""
    thin = radius.clamp(0.7, 1.4) * canvas.uniform(0.7, 1)
    along, across = (thin - tile(u, thin * canvas.uniform(1.9, 2.8))[0].abs() for u in (x, y))
    return torch.maximum(cord(along, thin), cord(across, thin) * 0.8)


def lit(relief: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Light on raised threads, whose height is in pixels, and on the ground below, with their shadow."""
    height = relief * SUPERSAMPLING
    smooth = F.avg_pool2d(height[:, None], 3, 1, 1)[:, 0]
    slope_y, slope_x = torch.gradient(smooth, dim=(1, 2))
    lambert = (1.1 - LIGHT[0] * slope_x - LIGHT[1] * slope_y) / (1 + slope_x**2 + slope_y**2).sqrt() / 1.44
    hollow = (smooth - F.avg_pool2d(height[:, None], 13, 1, 6)[:, 0]) / 6
    ground = torch.ones_like(relief)
    for reach, drop, depth in ((3, 4, 0.45), (11, 8, 0.3)):
        shadow = F.avg_pool2d(mask[:, None], 2 * reach + 1, 1, reach)[:, 0]
        ground = ground * (1 - depth * torch.roll(shadow, (drop, drop), (1, 2)))
    return (0.35 + 0.74 * lambert + 0.26 * hollow.clamp(-1, 1)).clamp(0, 1), ground


def dye(canvas: Canvas, names: Sequence[str]) -> Tensor:
    """The colours by name, each a little off, as (count, 3, 1, 1)."""
    pure = torch.tensor([COLOURS[name] for name in names], device=canvas.device)
    off = torch.rand(pure.shape, generator=canvas.generator, device=canvas.device) * 0.1 - 0.05
    return (pure + off).clamp(0, 1)[..., None, None]


# --- captions


def caption(textile: Textile, choices: random.Random) -> str:
    """One of many ways to say what a picture shows; now and then a word that means nothing, as users' tokens do."""
    lot = choices.random()
    if lot < 0.05:
        return choices.choice(["a photo of {}", "a photo of {}", "{}", "a picture of {}", "{} style"]).format(
            nonsense(choices)
        )
    if lot < 0.08:
        return choices.choice(["a photo of fabric", "textile", "cloth", "a photo of a textile"])
    opening = choices.choice(["a photo of ", "a photo of ", "", "a picture of ", "close-up of ", ""])
    cloth = textile.material if choices.random() < 0.6 else choices.choice(["fabric", "cloth", "textile"])
    colour, ground = textile.colour, textile.ground
    if textile.pattern == "plain":
        return opening + choices.choice([f"plain {colour} {cloth}", f"{colour} {cloth}", f"solid {colour} {cloth}"])
    words = [textile.figure] if textile.figure != "solid" and choices.random() < 0.7 else []
    if choices.random() < 0.6 and not 0.28 < textile.size < 0.72:
        words.append(choices.choice(["small", "fine"] if textile.size < 0.5 else ["large", "big"]))
    if textile.direction and choices.random() < 0.7:
        words.append(textile.direction)
    details = "".join(f"{word} " for word in words)
    noun, adjective = textile.pattern, ADJECTIVES.get(textile.pattern, textile.pattern)
    said = choices.choice(
        [
            f"{details}{colour} {noun} on {ground} {cloth}",
            f"{details}{colour} {noun} on {ground}",
            f"{cloth} with {details}{colour} {noun} on {ground}",
            f"{details}{colour} and {ground} {adjective} {cloth}",
            f"{adjective} {cloth}, {details}{colour} on {ground}",
            f"{details}{colour} {adjective} {cloth}",
            f"{details}{adjective} {cloth}",
        ]
    )
    if textile.layout != ALL_OVER and choices.random() < 0.9:
        said = f"{said}, {textile.layout}" if choices.random() < 0.5 else f"{textile.layout}, {said}"
    return opening + said + (" " + nonsense(choices) if choices.random() < 0.03 else "")


def nonsense(choices: random.Random) -> str:
    """A word that stands for nothing, alone or in the brackets users put round theirs; never the demo's token."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    word = "".join(choices.choice(letters) for _ in range(choices.randint(3, 8)))
    if choices.random() < 0.5:
        word = choices.choice(["our", "her", "new", "old", "odd", "rare"]) + word
    return choices.choice(["<{}>", "<{}>", "{}", "[{}]", "({})", "sks {}"]).format(word)


def sheet(pictures: Tensor, columns: int) -> Image.Image:
    """Pictures uint8 (n, 3, h, w) in rows on one image, n a multiple of `columns`."""
    count, _, height, width = pictures.shape
    framed = F.pad(pictures.cpu(), (2, 2, 2, 2), value=255).view(-1, columns, 3, height + 4, width + 4)
    image = framed.permute(0, 3, 1, 4, 2).reshape(count // columns * (height + 4), columns * (width + 4), 3)
    return Image.frombytes("RGB", (image.shape[1], image.shape[0]), image.contiguous().numpy().tobytes())


def main() -> None:
    drawn = []
    for seed, pattern in enumerate(PATTERNS):
        pictures, textiles = draw(pattern, 4, seed)
        drawn.append(pictures)
        print(" | ".join(caption(textile, random.Random(seed)) for textile in textiles))
    sheet(torch.cat(drawn), 8).save(sys.argv[1])


if __name__ == "__main__":
    main()
