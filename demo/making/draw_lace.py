"""Draw the demo's lace: 48 pictures for training and 12 held out, like phone photos of lace on cloth.

`python -m demo.making.draw_lace` redraws every picture from fixed seeds. A design is a list of threads on a
plane measured in *units*: the shorter side of every picture is `VIEW` units, so a thread two units wide is
four pixels wide once the picture is resized for a 256-pixel model. Each thread is swept as a round,
twisted cylinder into a height map, and the height map is lit from the upper left.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float64]
Image32 = NDArray[np.float32]  # [height, width]
Warp = Callable[[Array], Array]
Thread = tuple[Array, float, float | Array]  # points [n, 2] and radius in units, lift above the cloth

DEMO = Path(__file__).resolve().parents[1]
SETS = {"lace": (48, 1846), "held_out": (12, 1871)}  # folder: (pictures, seed)
SIZES = ((600, 800), (704, 528), (600, 600), (512, 768), (512, 640), (768, 576), (528, 704), (660, 528))
ROTATIONS = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
CLOTHS = (
    *((26, 26, 30), (27, 34, 66), (56, 58, 64), (78, 22, 36), (24, 60, 48), (78, 51, 38), (22, 22, 25)),
    *((64, 42, 84), (34, 76, 96), (128, 58, 48), (30, 42, 90), (46, 70, 50), (104, 40, 58), (84, 90, 106)),
)
YARNS = ((255, 253, 248), (253, 247, 233), (250, 240, 218))
SUPERSAMPLING = 2
VIEW = 122.0  # units along the shorter side of a picture
REACH = 180.0  # units from the middle to which edges and nets are laid, past every picture's corners
WHOLE = np.linspace(0, 2 * np.pi, 80)


def main() -> None:
    """Redraw both sets, replacing pictures of the same name."""
    for folder, (count, seed) in SETS.items():
        (DEMO / folder).mkdir(exist_ok=True)
        for index in range(count):
            lace = Lace(np.random.default_rng([seed, index]))
            DESIGNS[(index + index // len(DESIGNS)) % len(DESIGNS)](lace)
            ground = CLOTHS[(index * 5 + seed) % len(CLOTHS)]
            picture, exif = photograph(lace, SIZES[index * 5 % len(SIZES)], ground), Image.Exif()
            if index % 6 == 4:  # stored as a phone held sideways or upside down would store it
                exif[0x0112] = orientation = (6, 8, 3)[index // 6 % 3]
                picture = picture.transpose(ROTATIONS[orientation])
            quality = int(lace.rng.integers(80, 85))
            picture.save(DEMO / folder / f"lace_{index:03d}.jpg", quality=quality, exif=exif)
        print(f"{folder}: {count} pictures")


@dataclass
class Lace:
    """Threads laid so far, motifs (`bodies`) the net gives way to, and the `outline` the net ends at."""

    rng: np.random.Generator
    threads: list[Thread] = field(default_factory=list)
    net: list[Thread] = field(default_factory=list)
    bodies: list[Array] = field(default_factory=list)
    outline: Array = field(default_factory=lambda: REACH * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1.0]]))
    turn: float = 0.0  # radians by which the finished lace lies turned in its picture

    def __post_init__(self) -> None:
        self.flower = self.choose("ringed", "open", "double")
        self.leaf = self.choose("split", "veined")
        self.petal = self.choose("petal", "laddered")
        self.ground = self.choose("tulle", "square", "torchon", "honeycomb")
        self.petals = int(self.rng.integers(6, 9))

    def lay(self, points: Array, radius: float, lift: float | Array = 0.0) -> None:
        self.threads.append((points, radius, lift))

    def choose(self, *options: str) -> str:
        return options[int(self.rng.integers(len(options)))]


# --- designs


def border(lace: Lace) -> None:
    """A scalloped border: a rosette in every scallop, a leafy stem in the net above."""
    pitch, top_y = lace.rng.uniform(76, 88), float(lace.rng.choice([-66, -REACH]))
    lay_strip(lace, pitch, lace.rng.uniform(28, 36), top_y, lambda points: points)


def collar(lace: Lace) -> None:
    """The same border laid round a neck."""
    bend = lace.rng.uniform(170, 210)

    def place(points: Array) -> Array:
        turn, radius = points[:, :1] / bend, bend + points[:, 1:]
        return np.hstack([np.sin(turn), np.cos(turn)]) * radius - [0, bend]

    lay_strip(lace, 2 * np.pi / 13 * bend, 30, -64, place)


def lay_strip(lace: Lace, pitch: float, edge_y: float, top_y: float, place: Warp) -> None:
    xs = (np.arange(-4, 5) + lace.rng.choice([0.0, 0.5])) * pitch
    middles, depth = (xs[:-1] + xs[1:]) / 2, lace.rng.uniform(0.26, 0.32) * pitch
    long = np.linspace(xs[-1], xs[0], 400)
    rim = lay_edge(lace, place(np.column_stack([xs, 0 * xs + edge_y])), depth)
    top, under = (place(np.column_stack([long, 0 * long + y])) for y in (top_y, top_y + 9))
    lace.outline = np.concatenate([rim, top])
    lay_band(lace, top, under)
    radius = min(pitch * 0.43, 34.0)
    centre_y = edge_y + depth - 19 - radius
    for centre in place(np.column_stack([middles, 0 * middles + centre_y])):
        lay_rosette(lace, centre, radius)
    swing = 8 * np.cos(2 * np.pi * (long - middles[0]) / pitch)
    stem = place(np.column_stack([long, centre_y - radius - 18 - swing]))
    lay_sprig(lace, stem, round(8 * pitch / 19), lace.rng.uniform(21, 24))


def galloon(lace: Lace) -> None:
    """A band with two scalloped edges, large rosettes along its middle and sprays between them."""
    pitch, half = lace.rng.uniform(44, 50), lace.rng.uniform(42, 47)
    xs = (np.arange(-5, 6) + lace.rng.choice([0.0, 1.0])) * pitch
    cusps = np.column_stack([xs, 0 * xs + half])
    lace.outline = np.concatenate([lay_edge(lace, side, 0.3 * pitch) for side in (cusps, -cusps)])
    for x in xs[1::2]:
        lay_rosette(lace, np.array([x, 0.0]), 33)
    for x in xs[::2]:
        for y in (-20.0, 20.0):
            lay_spray(lace, np.array([x, y]), 6, 18, np.pi / 6)
    lace.turn = lace.rng.choice([0.0, np.pi / 2, 0.4, -0.4])


def corner(lace: Lace) -> None:
    """A handkerchief corner: scallops along two sides, a large rosette where they meet, sprigs beside it."""
    pitch, at = lace.rng.uniform(46, 54), lace.rng.uniform(42, 48)
    run = at - (0.75 + np.arange(6)) * pitch
    side = np.column_stack([run, 0 * run + at])
    rim = lay_edge(lace, np.concatenate([side[::-1], side[:, ::-1]]), 0.3 * pitch)
    lace.outline = np.concatenate([rim, [[-REACH, -REACH]]])
    middle = np.full(2, at - 48.0)
    lay_rosette(lace, middle, 36)
    for swap in (1, -1):
        stem = bezier(*(middle + np.array(way)[::swap] for way in ((-40, 12), (-75, 34), (-140, -12.0))))
        lay_sprig(lace, stem, 9, 24)
    lay_rosette(lace, middle - 56, 23)
    lace.turn = lace.rng.choice([0.0, np.pi / 4, -np.pi / 2, np.pi / 2])


def doily(lace: Lace) -> None:
    """A round doily: a rosette, a ring of leaves or a wreath in the net, and scallops round it."""
    count = int(lace.rng.choice([8, 10, 12]))
    turns = np.linspace(0, 2 * np.pi, count + 1)
    centre = np.zeros(2)
    lace.ground = lace.choose("tulle", "square", "torchon")  # rings leave scraps in so narrow a net
    lace.outline = lay_edge(lace, circle(centre, 46, -turns), lace.rng.uniform(7, 9))
    lace.petals = int(lace.rng.choice([8, 10]))
    lay_rosette(lace, centre, 24)
    if lace.choose("leaves", "wreath") == "wreath":
        lay_sprig(lace, circle(centre, 31, np.linspace(0, 2 * np.pi, 300)), count * 2, 10)
        return
    for turn in turns[:-1]:
        lay_leaf(lace, centre + 25 * ray(turn), centre + 40 * ray(turn), 10, 0.0, lace.leaf)


def all_over(lace: Lace) -> None:
    """Rosettes and sprays in a half-drop repeat over a net without end."""
    across, down = lace.rng.uniform(92, 98), lace.rng.uniform(130, 140)
    start = lace.rng.choice([0.0, 0.5])
    for column in range(-3, 4):
        for row in range(-2, 3):
            centre = np.array([(column + start) * across, (row + 0.5 * (column % 2)) * down])
            lay_rosette(lace, centre, 38)
            lay_spray(lace, centre + [0, down / 2], 6, 25, np.pi / 6)


DESIGNS = (border, doily, galloon, border, corner, collar, all_over)


# --- motifs


def lay_rosette(lace: Lace, centre: Array, radius: float) -> None:
    """Cloth petals round an open hub: free in the net, in a ring with spokes, or with a second whorl."""
    ringed, hub = lace.flower == "ringed", 0.21 * radius
    tip = 0.92 * radius if ringed else radius
    step = 2 * np.pi / lace.petals
    for turn in np.arange(lace.petals) * step - np.pi / 2:
        way, between = ray(turn), ray(turn + step / 2)
        lay_leaf(lace, centre + way * hub, centre + way * tip, 1.3 * tip * np.sin(step / 2), 0.0, lace.petal)
        lace.lay(centre + way * np.array([[hub * 0.45], [hub]]), 0.7, 0.5)
        if ringed:
            lace.lay(centre + between * np.array([[hub], [radius]]), 1.0, 0.4)
        if lace.flower == "double":
            ends = centre + between * np.array([[hub], [0.6 * radius]])
            lay_leaf(lace, ends[0], ends[1], 0.3 * radius, 0.0, "raised")
    lace.lay(circle(centre, hub, WHOLE), 1.6, 2.4)
    lace.lay(circle(centre, hub * 0.45, WHOLE), 0.8, 0.6)
    lace.bodies.append(circle(centre, hub, WHOLE))
    if ringed:
        lace.lay(circle(centre, radius, WHOLE), 1.7, 1.2)
        lay_picots(lace, circle(centre, radius, -WHOLE), 10.0)
        lace.bodies.append(circle(centre, radius, WHOLE))


def lay_sprig(lace: Lace, stem: Array, leaves: int, length: float) -> None:
    """Leaves of `length` units to the left and right of a corded stem [n, 2], in turn."""
    lace.lay(stem, 1.6, 1.6)
    for i, share in enumerate((np.arange(leaves) + 0.5) / leaves):
        here, ahead = along(stem, np.array([share - 0.002, share + 0.002]))
        side = 1 if i % 2 else -1
        way = unit(turned(ahead - here, side * 0.85))
        lay_leaf(lace, here + way * 1.5, here + way * length, length * 0.42, -side * 0.12, lace.leaf)


def lay_spray(lace: Lace, centre: Array, leaves: int, length: float, turn: float) -> None:
    """A star of leaves round an eyelet."""
    for angle in turn + np.arange(leaves) * 2 * np.pi / leaves:
        lay_leaf(lace, centre + ray(angle) * 4.5, centre + ray(angle) * length, length * 0.4, 0.08, lace.leaf)
    lace.lay(circle(centre, 4.5, WHOLE), 1.4, 2.0)


def lay_leaf(lace: Lace, base: Array, tip: Array, width: float, bend: float, style: str) -> None:
    """A leaf of cloth in a cord, `width` units across, bent aside by `bend` of its length."""
    if np.hypot(*base) > REACH + 20:  # past every picture's corners, and weaving takes time
        return
    u = np.linspace(0, 1, 48)[:, None]
    aside = turned(tip - base, np.pi / 2)
    axis = bezier(base, (base + tip) / 2 + 2 * bend * aside, tip, 48)
    rounded = style not in ("split", "veined")
    half = width / 2 * (np.sin(np.pi * u**1.45) ** 0.62 if rounded else np.sin(np.pi * u**0.85) ** 0.9)
    side, lift, dome = unit(aside) * half, 2.2 if style == "raised" else 0.3, 0.07 * width
    rim = np.concatenate([axis - side, (axis + side)[::-1]])
    if style in ("split", "laddered"):
        gap = unit(aside) * np.minimum(half * 0.4, 1.3 if style == "split" else 3.2)
        weave(lace, axis - side, axis - gap, lift, dome)
        weave(lace, axis + gap, axis + side, lift, dome)
    else:
        weave(lace, axis - side, axis + side, lift, dome)
        lace.lay(axis[2:36], 1.1, lift + dome + 0.9)
    if style == "laddered":
        rungs = np.stack([axis - gap, axis + gap], axis=1)[6:44:6]
        for rung in (*rungs, axis - gap, axis + gap):
            lace.lay(rung, 1.2, lift + 0.5)
    lace.lay(rim, 1.25, lift + 0.7)
    lace.bodies.append(rim)


def lay_edge(lace: Lace, cusps: Array, depth: float) -> Array:
    """A picoted band bulging `depth` units between `cusps`, to the right of the way they run; its rim."""
    slope = np.gradient(cusps, axis=0)
    if np.allclose(cusps[0], cusps[-1]):
        slope[[0, -1]] = cusps[1] - cusps[-2]
    inward = unit(turned(slope, -np.pi / 2))
    rim, inner, bars = (scallops(cusps + inward * inset, depth) for inset in (0, 8.5, 15))
    lay_band(lace, rim, inner)
    lace.lay(bars, 1.3, 0.9)
    shares = np.linspace(0, 1, int(np.hypot(*np.diff(inner, axis=0).T).sum() / 10))
    for ends in zip(along(inner, shares), along(bars, shares), strict=True):
        lace.lay(np.stack(ends), 1.2, 0.4)
    lay_picots(lace, rim, 9.5)
    lace.bodies.append(np.concatenate([rim, bars[::-1]]))
    return rim


def scallops(cusps: Array, depth: float) -> Array:
    """Round arcs from cusp to cusp, bulging to the right of the way they run (y grows downward)."""
    t = np.linspace(0, 1, 50)[:, None]
    bulge = depth * np.sin(np.pi * t) ** 0.8
    chords = zip(cusps[:-1], cusps[1:], strict=True)
    return np.concatenate([a + (b - a) * t + unit(turned(b - a, np.pi / 2)) * bulge for a, b in chords])


def lay_picots(lace: Lace, rim: Array, spacing: float) -> None:
    """Little loops every `spacing` units on the right of the way `rim` runs."""
    count = int(np.hypot(*np.diff(rim, axis=0).T).sum() / spacing)
    here, ahead = (along(rim, (np.arange(count) + start) / count) for start in (0.45, 0.55))
    for centre in (here + ahead) / 2 + 3 * unit(turned(ahead - here, np.pi / 2)):
        lace.lay(circle(centre, 2.4, WHOLE[::5]), 1.3, 0.3)


def lay_band(lace: Lace, left: Array, right: Array) -> None:
    """A strip of cloth between two cords."""
    weave(lace, left, right, 0.3)
    lace.lay(left, 1.6, 1.1)
    lace.lay(right, 1.5, 1.1)
    lace.bodies.append(np.concatenate([left, right[::-1]]))


def weave(lace: Lace, left: Array, right: Array, lift: float, dome: float = 0.0) -> None:
    """Cloth stitch between two rails [n, 2], `dome` units higher midway: threads along, one to and fro."""
    width, length = np.hypot(*(right - left).T).max(), np.hypot(*np.diff(left, axis=0).T).sum()
    count, rows = max(2, round(width / 2.4)), max(2, round(length / 2.4))
    for share in (np.arange(count) + 0.5) / count:
        lace.lay(left + (right - left) * share, 1.15, lift + dome * np.sin(np.pi * share))
    run = np.linspace(0, rows, rows * (2 * count + 2) + 1)
    row, share = np.divmod(run, 1)
    share = np.where(row % 2, 1 - share, share)
    over = np.sin(np.pi * count * share) * np.where(row % 2, -1, 1)
    a, b = along(left, run / rows), along(right, run / rows)
    lace.lay(a + (b - a) * share[:, None], 1.0, lift + dome * np.sin(np.pi * share) + 0.3 * over)


# --- net


def lay_net(lace: Lace) -> None:
    """Fill the plane with one kind of net, its meshes 21 to 25 units across."""
    mesh = lace.rng.uniform(21, 25)
    run, lanes = np.arange(-REACH, REACH, 0.7), np.arange(-REACH, REACH, mesh)
    if lace.ground == "tulle":  # threads run down the net and twist round one neighbour, then round the other
        swing = np.clip(np.abs((run / (mesh * 1.732) % 1) * 4 - 2) * 3 - 3, -1, 1)
        for i, x in enumerate(np.arange(-REACH, REACH, mesh / 2)):
            sway = x + (mesh / 4 - 0.5) * swing * (-1) ** i
            lace.net.append((np.column_stack([sway, run]), 0.9, 0.0))
    elif lace.ground == "honeycomb":
        for i, y in enumerate(np.arange(-REACH, REACH, mesh * 0.866)):
            for x in lanes + i % 2 * mesh / 2:
                lace.net.append((circle(np.array([x, y]), mesh / 2 - 0.4, WHOLE[::2]), 0.95, 0.0))
    else:  # lines on both diagonals: single, or pairs that twist between crossings
        plies, radius = ((0.0,), 1.05) if lace.ground == "square" else ((-0.9, 0.9), 0.75)
        for x, ply in product(lanes, plies):
            wave = x + ply * np.sin(run / mesh * 3 * np.pi)
            for way in (np.column_stack([wave, run]), np.column_stack([run, wave])):
                lace.net.append((turned(way, np.pi / 4), radius, 0.0))


# --- photograph


def photograph(lace: Lace, size: tuple[int, int], cloth: tuple[int, int, int]) -> Image.Image:
    """The lace lying on `cloth`, `size` (width, height) pixels, lit from the upper left."""
    rng, (width, height) = lace.rng, size
    lay_net(lace)
    scale = min(size) / VIEW  # pixels per unit
    tilt, slant = rng.uniform(-0.09, 0.09), rng.uniform(-2.5e-4, 2.5e-4, 2)
    phases, lengths = rng.uniform(0, 2 * np.pi, 6), rng.uniform(24, 60, 4)
    fold_way, fold_length = ray(rng.uniform(0, np.pi)), rng.uniform(120, 220) / (2 * np.pi)

    def lay_out(points: Array) -> Array:
        """Units in the design to pixels in the picture: turned, seen at a slant, pulled a little by hand."""
        points = turned(points, lace.turn + tilt)
        fine = np.sin(points[:, ::-1] / lengths[:2] + phases[:2]) + np.sin(points / lengths[2:] + phases[2:4])
        fold = np.sin(points @ fold_way / fold_length + phases[4])
        points = points + 0.45 * fine + 2.2 * fold[:, None] * fold_way
        return (points / (1 + points @ slant)[:, None]) * scale + [width / 2, height / 2]

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    place = (fold_way[0] * (x - width / 2) + fold_way[1] * (y - height / 2)) / scale
    falloff = (x / width - 0.4) ** 2 + (y / height - 0.35) ** 2
    light = 1.06 + 0.09 * np.cos(place / fold_length + phases[4] + 0.6) - rng.uniform(0.15, 0.4) * falloff
    covered, lit = shade(sweep(lace, lay_out, scale, size), scale)
    yarn = np.array(YARNS[int(rng.integers(len(YARNS)))])
    thread = yarn * lit[..., None] ** np.array([0.94, 1.0, 1.08])  # warm in the hollows
    ground = np.array(cloth) * weave_ground(rng, covered, scale)[..., None]
    picture = (ground * (1 - covered[..., None]) + thread) * light[..., None]
    picture += rng.normal(0, 1.0, (height, width, 1)) + rng.normal(0, 0.3, picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def sweep(lace: Lace, lay_out: Warp, scale: float, size: tuple[int, int]) -> Image32:
    """Height of the lace above the cloth in pixels [height * S, width * S]; 0 where the cloth is bare."""
    width, height = size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING
    fine = scale * SUPERSAMPLING
    stencil = Image.new("L", (int(4 * REACH),) * 2)  # where the net shows, 2 pixels per unit
    pen = ImageDraw.Draw(stencil)
    for shape, tone in ((lace.outline, 255), *((body, 0) for body in lace.bodies)):
        pen.polygon([tuple(point) for point in (shape + REACH) * 2], fill=tone)
    shows = np.asarray(stencil) > 0
    relief = np.zeros(height * width, dtype=np.float32)
    for number, (points, radius, lift) in enumerate(lace.net + lace.threads):
        bends = lay_out(points) * SUPERSAMPLING
        if np.any(bends.max(axis=0) < -20) or np.any(bends.min(axis=0) > [width + 20, height + 20]):
            continue
        steps = np.concatenate([[0], np.hypot(*np.diff(bends, axis=0).T).cumsum()])
        s = np.arange(0, steps[-1], 0.6)
        pixels = np.column_stack([np.interp(s, steps, axis) for axis in bends.T])
        lifts = np.interp(s, steps, np.broadcast_to(lift, len(points)))
        side = unit(turned(np.gradient(pixels, axis=0), np.pi / 2))
        if number < len(lace.net):
            cells = np.column_stack([np.interp(s, steps, axis) for axis in ((points + REACH) * 2).T])
            column, row = np.clip(cells, 0, 4 * REACH - 1).astype(int).T
            kept = shows[row, column]
            s, lifts, pixels, side = s[kept], lifts[kept], pixels[kept], side[kept]
        thick = radius * fine * (1 + 0.09 * np.sin(s / fine / 13 + number))[:, None]
        d = np.linspace(-1, 1, int(radius * fine * 3.4) + 2)
        twist = 0.93 + 0.12 * np.abs(np.sin(np.pi * s[:, None] / (2.4 * radius * fine) + 1.2 * d))
        z = lifts[:, None] * fine + thick * np.sqrt(1.02 - d * d) * twist
        spots = np.rint(pixels[:, None] + side[:, None] * (thick * d)[..., None]).astype(np.int32)
        inside = np.all((spots >= 0) & (spots < [width, height]), axis=-1)
        np.maximum.at(relief, (spots[..., 1] * width + spots[..., 0])[inside], z[inside].astype(np.float32))
    return relief.reshape(height, width)


def shade(relief: Image32, scale: float) -> tuple[Image32, Image32]:
    """Share of every pixel that is thread, and that share times the light the thread gives back."""
    covered = (relief > 0).astype(np.float32)
    smooth = blur(relief, 1)
    dy, dx = np.gradient(smooth)
    lambert = (1.1 + 0.55 * dx + 0.75 * dy) / np.sqrt(1 + dx * dx + dy * dy) / 1.44
    hollow = np.clip((smooth - blur(relief, round(2.2 * scale))) / (2 * scale * SUPERSAMPLING), -1, 1)
    lit = np.clip(0.35 + 0.74 * lambert + 0.26 * hollow, 0, 1) * covered

    def shrink(image: Image32) -> Image32:
        rows, columns = (extent // SUPERSAMPLING for extent in image.shape)
        return image.reshape(rows, SUPERSAMPLING, columns, SUPERSAMPLING).mean(axis=(1, 3))

    return shrink(covered), shrink(lit)


def weave_ground(rng: np.random.Generator, covered: Image32, scale: float) -> Image32:
    """Light on the plain-woven cloth under the lace, the lace's soft shadow taken off."""
    y, x = np.mgrid[0 : covered.shape[0], 0 : covered.shape[1]].astype(np.float32)
    slubs = blur(rng.normal(0, 1, covered.shape).astype(np.float32), 1)
    texture = 1 + 0.05 * np.sin(x * 1.9) * np.sin(y * 1.9) + 0.08 * slubs
    for reach, depth in ((0.5, 0.45), (2.0, 0.3)):
        shadow, drop = blur(covered, max(1, round(reach * scale))), round((0.9 + 0.8 * reach) * scale)
        texture *= 1 - depth * np.pad(shadow, ((drop, 0), (drop, 0)), mode="edge")[:-drop, :-drop]
    return texture


# --- geometry


def ray(angle: float) -> Array:
    return np.array([np.cos(angle), np.sin(angle)])


def circle(centre: Array, radius: float, angles: Array) -> Array:
    return centre + radius * np.column_stack([np.cos(angles), np.sin(angles)])


def turned(points: Array, angle: float) -> Array:
    (c, s), (x, y) = ray(angle), np.moveaxis(points, -1, 0)
    return np.stack([c * x - s * y, s * x + c * y], axis=-1)


def unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def bezier(start: Array, bend: Array, end: Array, count: int = 80) -> Array:
    t = np.linspace(0, 1, count)[:, None]
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t * t * end


def along(points: Array, shares: Array) -> Array:
    """Points at `shares` (0 to 1) of the length of a polyline [n, 2]."""
    steps = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
    return np.column_stack([np.interp(shares * steps[-1], steps, axis) for axis in points.T])


def blur(image: Image32, reach: int) -> Image32:
    """Two passes of a box 2 * `reach` + 1 pixels wide on both axes."""
    for axis in (0, 1, 0, 1):
        padding = [(reach + 1, reach) if a == axis else (0, 0) for a in (0, 1)]
        total = np.moveaxis(np.pad(image, padding, mode="edge").cumsum(axis=axis, dtype=np.float64), axis, 0)
        image = np.moveaxis(total[2 * reach + 1 :] - total[: -2 * reach - 1], 0, axis) / (2 * reach + 1)
        image = image.astype(np.float32)
    return image


if __name__ == "__main__":
    main()
