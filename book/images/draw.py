"""Draw the book's own images: logo, favicon and the picture in the README.

    python book/images/draw.py            all of them, into this folder

The logo is a tensor train: three cores, joined by their ranks, each with one open mode.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, INK = "#0072B2", "#D55E00", "#009E73", "#3a3f44"
CORES = ((32, BLUE), (96, ORANGE), (160, GREEN))  # centre x on a 192 x 96 canvas, colour
HALF, TOP, BOTTOM = 21, 42, 84


def logo_svg() -> str:
    """The logo as SVG text; the lettering uses the reader's sans-serif font."""
    line = f'stroke="{INK}" stroke-width="5" stroke-linecap="round"'
    parts = [f'<line x1="32" y1="{TOP}" x2="160" y2="{TOP}" {line}/>']
    for x, colour in CORES:
        parts += [f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{BOTTOM}" {line}/>',
                  f'<rect x="{x - HALF}" y="{TOP - HALF}" width="{2 * HALF}" height="{2 * HALF}" rx="7" '
                  f'fill="{colour}"/>']
    text = (f'<text x="212" y="68" font-family="system-ui, sans-serif" font-size="62" font-weight="600" '
            f'fill="{INK}">tdlib</text>')
    return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 380 104" role="img" aria-label="tdlib">'
            '<rect width="380" height="104" rx="14" fill="#ffffff"/>' + "".join(parts) + text + "</svg>\n")


def mark(size: int) -> Image.Image:
    """The train alone, on a square transparent canvas of ``size`` pixels (drawn at 4x and reduced)."""
    scale = 4 * size / 192
    image = Image.new("RGBA", (4 * size, 4 * size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)

    def at(*values: float) -> list[float]:
        return [v * scale for v in values]

    down = 34  # centres the drawing on the square
    draw.line(at(32, TOP + down, 160, TOP + down), fill=INK, width=round(9 * scale))
    for x, colour in CORES:
        draw.line(at(x, TOP + down, x, BOTTOM + down + 16), fill=INK, width=round(9 * scale))
        draw.rounded_rectangle(at(x - HALF - 5, TOP + down - HALF - 5, x + HALF + 5, TOP + down + HALF + 5),
                               radius=8 * scale, fill=colour)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def front_picture() -> None:
    """The README's picture: error against ratio for a kernel of a network trained on the digits."""
    import torch

    import tdlib
    from tdbook.figures import primer

    data = tdlib.data.load("digits", seed=0)
    torch.manual_seed(0)
    model = tdlib.models.build("cnn", data.classes, input_shape=data.input_shape)
    tdlib.train.fit(model, data, epochs=20, lr=0.1, weight_decay=1e-2, batch_size=64, seed=0, progress=False)
    _, weight = primer.largest_kernel(model)
    figure = primer.error_figure(primer.error_curves(weight), "A trained 64×64×3×3 kernel in four formats")
    figure.savefig(HERE / "front.png", bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    (HERE / "logo.svg").write_text(logo_svg(), encoding="utf-8")
    mark(64).save(HERE / "favicon.ico", sizes=[(16, 16), (32, 32), (48, 48), (64, 64)])
    front_picture()
