"""Renders the built-in dataset: one of ten figures per image, anywhere, in any colors, amid clutter.

Everything that could give the class away without the shape is drawn independently of the class: the
size of the image, the bounding box of the figure, colors, textures, clutter, noise and JPEG quality
(and with it the size of the file). Every figure has an axis of symmetry, and tilts are symmetric, so a flip
does not change the class.
"""

import io

import numpy as np
from PIL import Image, ImageDraw

SEED = 2012
SPLITS = {'train': (0, 2000), 'validation': (1, 1000)}  # name: (index of the split, images)

SHORTER_SIDE = (96, 200)  # pixels, inclusive
ASPECT = (1.0, 1.4)  # longer side / shorter side
FIGURE_SIDE = (0.55, 0.80)  # side of the figure's bounding box / shorter side of the image
FIGURE_STRETCH = 1.2  # largest ratio of the bounding box's sides
TILT = 15.0  # degrees, either way
CONTRAST = 150.0  # minimum distance between the colors of figure and ground, in RGB levels
TEXTURE = (0.0, 20.0)  # amplitude of the textures, in levels
NOISE = (2.0, 14.0)  # standard deviation of the pixel noise, in levels
QUALITY = (70, 96)  # JPEG quality, inclusive
CLUTTER = (3, 8)  # number of small stray objects, inclusive


def _circle(radius: float = 1.0) -> np.ndarray:
    angles = np.radians(np.linspace(0.0, 360.0, 49))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star(points: int, inner: float) -> np.ndarray:
    angles = np.pi * np.arange(2 * points) / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 49)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -y / 16], axis=1)


def _cross() -> np.ndarray:
    arm = 0.3
    quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _crescent() -> np.ndarray:
    bite = _circle(0.85) + (0.55, 0.0)
    outer = _circle()
    return np.concatenate(
        [
            outer[np.linalg.norm(outer - (0.55, 0.0), axis=1) > 0.85],
            bite[np.linalg.norm(bite, axis=1) < 1.0][::-1],
        ]
    )


# Each figure: polygons f64[n,2] (x right, y down); all but the first are holes.
FIGURES = {
    'arrow': [np.array([(0, -1), (0.8, 0), (0.3, 0), (0.3, 1), (-0.3, 1), (-0.3, 0), (-0.8, 0)])],
    'crescent': [_crescent()],
    'cross': [_cross()],
    'disc': [_circle()],
    'heart': [_heart()],
    'hourglass': [np.array([(-1, -1), (1, -1), (0.15, 0), (1, 1), (-1, 1), (-0.15, 0)])],
    'ring': [_circle(), _circle(0.6)],
    'square': [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])],
    'star': [_star(5, 0.42)],
    'triangle': [_star(3, 0.5)],
}
NAMES = list(FIGURES)


def _colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    while True:
        figure, ground = rng.uniform(15, 240, (2, 3))
        if np.linalg.norm(figure - ground) >= CONTRAST:
            return figure, ground


def _texture(rng: np.random.Generator, color: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draws a plain, shaded, striped, checkered or blotchy surface -> f32[height,width,3]."""
    kind = rng.integers(5)
    y, x = np.ogrid[:height, :width]
    angle, phase, period = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(6, 20)
    along = (np.cos(angle) * x + np.sin(angle) * y).astype(np.float32)
    if kind == 0:
        pattern = np.zeros((height, width), np.float32)
    elif kind == 1:
        pattern = 2 * (along - along.min()) / np.ptp(along) - 1
    elif kind == 2:
        pattern = np.sin(along * np.float32(2 * np.pi / period) + np.float32(phase))
    elif kind == 3:
        pattern = (((x // period) + (y // period)) % 2 * 2 - 1).astype(np.float32)
    else:
        coarse = Image.fromarray(rng.uniform(-1, 1, (7, 7)).astype(np.float32))
        pattern = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    tint = rng.uniform(*TEXTURE) * rng.uniform(0.5, 1.0, 3)
    return color.astype(np.float32) + pattern[:, :, None] * tint.astype(np.float32)


def _mask(rng: np.random.Generator, label: int, height: int, width: int):
    """Draws a figure in a box independent of it -> (f32[height,width,1], box x0, y0, x1, y1)."""
    shorter = min(height, width)
    stretch = FIGURE_STRETCH ** rng.uniform(-0.5, 0.5)
    side = shorter * rng.uniform(*FIGURE_SIDE)
    size = np.array([side * stretch, side / stretch])
    # Inside the central square, which is all that `prepare` keeps.
    corner = (np.array([width, height]) - shorter) / 2 + rng.uniform(0, 1, 2) * (shorter - size)
    tilt = np.radians(rng.uniform(-TILT, TILT))
    turn = np.array([(np.cos(tilt), np.sin(tilt)), (-np.sin(tilt), np.cos(tilt))])
    polygons = [polygon @ turn for polygon in FIGURES[NAMES[label]]]
    if rng.integers(2):
        polygons = [polygon * (-1, 1) for polygon in polygons]
    low, high = polygons[0].min(axis=0), polygons[0].max(axis=0)
    mask = Image.new('L', (2 * width, 2 * height))
    draw = ImageDraw.Draw(mask)
    for number, polygon in enumerate(polygons):
        points = 2 * (corner + (polygon - low) / (high - low) * size)
        draw.polygon([tuple(point) for point in points], fill=0 if number else 255)
    # drawn at twice the size, for smooth edges
    mask = np.asarray(mask.reduce(2), np.float32)[:, :, None] / 255
    return mask, (*corner, *(corner + size))


def _clutter(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    unit = min(image.size)
    for _ in range(rng.integers(CLUTTER[0], CLUTTER[1], endpoint=True)):
        x, y = rng.uniform(0, 1, 2) * image.size
        color = tuple(int(level) for level in rng.integers(0, 256, 3))
        dx, dy = rng.uniform(-0.12, 0.12, 2) * unit
        if rng.integers(2):
            draw.line((x, y, x + 2 * dx, y + 2 * dy), color, width=int(rng.integers(1, 4)))
        else:
            radius = rng.uniform(0.015, 0.05) * unit
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), color)
    return np.asarray(image, np.float32)


def render(seed: int, split: int, index: int) -> tuple[bytes, int, tuple[float, ...]]:
    """Renders image `index` of a split -> (JPEG, label, box x0, y0, x1, y1 as fractions of the sides).

    A pure function of its arguments; the label is `index` modulo ten.
    """
    rng = np.random.default_rng([seed, split, index])
    label = index % len(NAMES)
    shorter = rng.integers(*SHORTER_SIDE, endpoint=True)
    longer = round(shorter * rng.uniform(*ASPECT))
    height, width = (shorter, longer) if rng.integers(2) else (longer, shorter)
    figure_color, ground_color = _colors(rng)
    figure = _texture(rng, figure_color, height, width)
    ground = _texture(rng, ground_color, height, width)
    mask, box = _mask(rng, label, height, width)
    picture = _clutter(rng, ground + mask * (figure - ground))
    noise = rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.uniform(*NOISE))
    picture = np.clip(picture + noise + 0.5, 0, 255).astype(np.uint8)
    encoded = io.BytesIO()
    quality = int(rng.integers(*QUALITY, endpoint=True))
    Image.fromarray(picture).save(encoded, 'JPEG', quality=quality)
    return encoded.getvalue(), label, tuple(np.array(box) / (width, height, width, height))
