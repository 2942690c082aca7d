"""PNG plots of layers: for each shape a grid (time, share of the roofline, speed-up) x (weight format), and one headline."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from report import TITLES, Cell, best_ours, best_peer, group, section_name, sections, speed_up, title

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS = ("#0b5fa5", "#e07b00", "#6a3d9a")
PEERS = ("#8c8c8c", "#b5651d", "#5f9e6e", "#c44e52", "#937860", "#64b5cd")
FORMAT_COLORS = {"bf16": "#555555", "mxfp8": "#0b5fa5", "mxfp4": "#e07b00", "nvfp4": "#2a8f4f"}
ORDER = [(f, g) for g in ("a16", "a8", "emulation") for f in TITLES]


def _lines(axis: Axes, cells: list[Cell], place: dict[int, int], key: str, scale: float) -> None:
    """One line a name: ours thick and coloured, peers thin and dashed."""
    names = list(dict.fromkeys(c["name"] for c in cells if "us" in c))
    for mine, colors in ((True, OURS), (False, PEERS)):
        for i, name in enumerate(n for n in names if n.startswith("mx_") == mine):
            points = sorted((place[c["tokens"]], scale * c[key]) for c in cells if c["name"] == name and "us" in c)
            style = {"linewidth": 2.4, "zorder": 3} if mine else {"linewidth": 1.2, "linestyle": "--"}
            marker = "o" if mine else "sv^Dx+"[i % 6]
            axis.plot(
                *zip(*points, strict=True),
                marker=marker,
                markersize=4.5,
                label=name,
                color=colors[i % len(colors)],
                **style,
            )


def _ticks(axis: Axes, place: dict[int, int]) -> None:
    axis.set_xticks(list(place.values()), [str(t) for t in place], fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_xlim(-0.5, len(place) - 0.5)
    axis.grid(alpha=0.25)


def _bars(axis: Axes, cells: list[Cell], key: tuple[str, str], place: dict[int, int]) -> None:
    """Speed-up of our fastest over the best peer: a bar a token count, labelled, red where we lose."""
    for t, c in sorted(best_ours(cells, key).items()):
        value = speed_up(c, cells)
        if value is None:
            continue
        color = "#2a8f4f" if value >= 1.1 else "#9cc9a8" if value >= 1 else "#c44e52"
        axis.bar(place[t], value, 0.7, color=color, zorder=2)
        axis.text(place[t], value, f"{value:.2f}", ha="center", va="bottom", fontsize=8)
    axis.axhline(1, color="black", linewidth=0.9, zorder=3)
    top = max(1.2, *(bar.get_height() for bar in axis.patches)) if axis.patches else 1.2
    axis.set_ylim(0, 1.12 * top)


def plot_section(name: str, cells: list[Cell], path: Path) -> None:
    """One shape and routing."""
    keys = [k for k in ORDER if any(group(c) == k and "us" in c for c in cells)]
    if not keys:
        return
    tokens = sorted({c["tokens"] for c in cells})
    place = {t: i for i, t in enumerate(tokens)}
    figure, axes = plt.subplots(
        3, len(keys), figsize=(4.1 * len(keys) + 0.6, 10.2), squeeze=False, layout="constrained"
    )
    for column, key in enumerate(keys):
        here = [c for c in cells if group(c) == key]
        time, share, ratio = axes[:, column]
        _lines(time, here, place, "us", 1)
        floors = {c["tokens"]: c["floor_us"] for c in here if "us" in c}
        time.plot(
            [place[t] for t in floors],
            list(floors.values()),
            color="black",
            linewidth=1,
            linestyle=":",
            label="roofline",
        )
        time.set_yscale("log")
        time.set_title(title(key), fontsize=12, fontweight="bold")
        time.legend(fontsize=7.5, loc="upper left", framealpha=0.85)
        _lines(share, here, place, "share", 100)
        share.set_ylim(0, 100)
        _bars(ratio, here, key, place)
        if not ratio.patches:
            ratio.text(0.5, 0.5, "no peer measured", transform=ratio.transAxes, ha="center", color="#888888")
        ratio.set_xlabel("tokens")
        for axis in axes[:, column]:
            _ticks(axis, place)
    for row, label in enumerate(("microseconds", "% of the roofline", "best peer's time / ours")):
        axes[row, 0].set_ylabel(label)
    figure.suptitle(name, fontsize=11)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def headline(name: str, cells: list[Cell], path: Path) -> None:
    """Speed-up of our fastest over the best peer with 16-bit activations, one panel a shape, one line a weight format."""
    shapes = [s for s in sections(cells) if any(speed_up(c, cells) for c in cells if (c["shape"], c["routing"]) == s)]
    if not shapes:
        return
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(4.6 * len(shapes) + 0.4, 4.2), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, section in zip(axes[0], shapes, strict=True):
        here = [c for c in cells if (c["shape"], c["routing"]) == section]
        place = {t: i for i, t in enumerate(sorted({c["tokens"] for c in here}))}
        for fmt, color in FORMAT_COLORS.items():
            ours = best_ours(here, (fmt, "a16"))
            points = [(place[t], peer["us"] / c["us"]) for t, c in sorted(ours.items()) if (peer := best_peer(c, here))]
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker="o", color=color, linewidth=2, label=f"{TITLES[fmt]} weights"
                )
        axis.axhline(1, color="black", linewidth=1)
        axis.set_title(section_name(*section), fontsize=12, fontweight="bold")
        axis.set_xlabel("tokens")
        _ticks(axis, place)
    axes[0, 0].set_ylabel("best peer's time / ours")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=9, loc="upper right")
    figure.suptitle(f"Speed-up over the best peer — {name}", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)
