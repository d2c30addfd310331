"""Writes what a run gave: one-file HTML report, metrics.json, a cloud to open in a viewer, and a picture."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from depthlm_ros import charts
from depthlm_ros.evaluate import AnsweredFrame, Run
from depthlm_ros.overlay import depth_range, overlay
from depthlm_ros.ply import write_ply

PANEL_WIDTH = 320
# More dots than this would hide the picture under them.
MOST_DOTS = 5000
_STYLE = """
:root{color-scheme:light dark;--ink:#1c2330;--soft:#667085;--paper:#fbfbf9;--card:#fff;--line:#e4e4de;--good:#1f8a70;
--bad:#d1495b;--muted:#a3a9b5;--band:#1f8a7018;--track:#eeeee9}
@media (prefers-color-scheme:dark){:root{--ink:#e8e9ed;--soft:#98a0ae;--paper:#14161b;--card:#1c1f26;--line:#2c303a;
--good:#3fbf9b;--bad:#ef6f7f;--muted:#5b6270;--band:#3fbf9b1c;--track:#262a33}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 24px 80px}h1{font-size:30px;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:18px;margin:44px 0 12px}p{margin:0 0 10px;max-width:75ch}.soft{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin:26px 0}
.card,.box{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:25px;white-space:nowrap;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:13px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:16px}
.frame{margin-bottom:18px}.frame h3{font-size:14px;margin:0 0 10px;font-weight:600}
.frame h3 span{color:var(--soft);font-weight:400}
.panels{display:grid;grid-template-columns:repeat(4,1fr);gap:8px}
@media (max-width:760px){.panels{grid-template-columns:1fr 1fr}}
figure{margin:0}figure img{width:100%;display:block;border-radius:6px}
figcaption{font-size:12.5px;color:var(--soft);margin-top:4px}
.scale{max-width:480px;margin:8px 0 0 auto}svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:13px;font-family:inherit}svg text.strong{fill:var(--ink);font-weight:600}
.good{fill:var(--good)}.bad{fill:var(--bad)}.muted{fill:var(--muted)}.band{fill:var(--band)}.track{fill:var(--track)}
.line{fill:none;stroke-width:2}.line.good{stroke:var(--good)}.line.muted{stroke:var(--muted)}.faint{opacity:.35}
.axis{stroke:var(--muted);stroke-width:1}.whisker{stroke:var(--ink);stroke-width:1.5;fill:none}
table{border-collapse:collapse;width:100%}td{padding:5px 0;border-bottom:1px solid var(--line);vertical-align:top}
td:last-child{text-align:right;font-variant-numeric:tabular-nums;padding-left:20px;overflow-wrap:anywhere}
ul{padding-left:20px;margin:0}li{margin-bottom:4px}
"""


def write_report(folder: str | Path, run: Run) -> list[Path]:
    """Writes report.html, metrics.json, calibration.json, cloud.ply and picture.png into a folder, which is made.

    Files of an earlier run that this one doesn't write again (no frame was answered, so no cloud) are removed, so that
    the folder never mixes two runs.

    Returns:
        The paths written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cloud, picture, curve = folder / "cloud.ply", folder / "picture.png", folder / "calibration.json"
    for stale in (cloud, picture, curve):
        stale.unlink(missing_ok=True)
    written = [folder / "report.html", folder / "metrics.json"]
    written[0].write_text(page(run), encoding="utf-8")
    written[1].write_text(json.dumps(metrics(run), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    fitted = run.fitted()
    if fitted is not None:
        fitted.save(curve)
        written.append(curve)
    if run.tally.pictures:
        middle = run.tally.pictures[len(run.tally.pictures) // 2]
        points_m, rgb = _coloured_points(middle)
        write_ply(cloud, points_m, rgb, middle.confidence, f"{run.title}, {middle.name}")
        Image.fromarray(contact_sheet(run)).save(picture, optimize=True)
        written += [cloud, picture]
    return written


def metrics(run: Run) -> dict:
    """Everything measured, as metrics.json holds it."""
    return {
        "title": run.title,
        **run.tally.scores(),
        **({"calibration": calibration} if (calibration := run.tally.calibration()) else {}),
        "run": run.figures,
        "environment": run.environment,
        "about_model": run.about_model,
        "broke_off": run.broke_off,
        "notes": list(run.notes),
        "frames": run.tally.frames,
    }


def summary(run: Run) -> str:
    """The figures for a terminal."""
    scores, figures = run.tally.scores(), run.figures
    lines = [run.title]
    lines += [f"  {run.about_model}"] if run.about_model else []
    if scores:
        depth, baselines = scores["depth"], scores["baselines"]
        interval = scores["delta1_interval_95"]
        spread = f" (95 % of image draws: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        lines += [
            f"  δ1            {_number(depth['delta1'])}{spread}",
            f"  baselines     best constant {baselines['best_constant']['delta1']:.3f}, "
            f"row prior {baselines['row_prior']['delta1']:.3f} (oracles, fitted to these very points)",
            f"  AbsRel        {_number(depth['abs_rel'])}",
            f"  RMSE, m       {_number(depth['rmse'])}",
            f"  compared      {scores['compared']} of {scores['labels']} true depths, "
            f"{depth['answered']} with an answer (without one is wrong)",
        ]
        lines += [f"  δ1, between   {_between_words(scores['densified'])}"] if "densified" in scores else []
        calibration = run.tally.calibration()
        lines += [f"  calibration   {_calibration_words(calibration)}"] if calibration else []
    else:
        lines.append("  nothing to score: no true depth at any asked pixel")
    lines.append(f"  points/s      {figures['points_per_second']:.0f}")
    if "frames_sent" in figures:
        lines.append(
            f"  frames        {figures['frames_sent']} sent, {figures['frames_answered']} answered, "
            f"{figures['frames_dropped']} dropped"
        )
    if not run.tally.frames:
        lines += [f"  {note}" for note in run.notes]
    if "latency_p50_s" in figures:
        lines.append(f"  latency       median {figures['latency_p50_s']:.3f} s, 95 % {figures['latency_p95_s']:.3f} s")
    lines += [f"  {run.broke_off}"] if run.broke_off else []
    return "\n".join(lines)


def contact_sheet(run: Run, rows: int = 3) -> np.ndarray:
    """(H, W, 3) uint8: input, overlay, predicted, true depth and the cloud of a few frames, with captions."""
    pictures = run.tally.pictures
    chosen = [
        pictures[i] for i in sorted({round(x) for x in np.linspace(0, len(pictures) - 1, min(rows, len(pictures)))})
    ]
    names = ["input", "asked pixels, by depth", "predicted depth", "true depth", "cloud, from the side"]
    strips = []
    for frame in chosen:
        panels = _panels(frame)
        height = round(PANEL_WIDTH * frame.image.shape[0] / frame.image.shape[1])
        images = [
            Image.fromarray(panel).resize((PANEL_WIDTH, height), Image.Resampling.LANCZOS) for _, panel in panels[:4]
        ]
        side = charts.view_cloud(*_coloured_points(frame), (PANEL_WIDTH, height))
        strips.append(
            np.hstack([np.pad(np.asarray(i), ((0, 6), (0, 6), (0, 0)), constant_values=255) for i in [*images, side]])
        )
    caption = Image.new("RGB", (strips[0].shape[1], 26), "white")
    draw = ImageDraw.Draw(caption)
    shown = names if len(_panels(chosen[0])) == 4 else [*names[:3], names[4]]
    for index, name in enumerate(shown):
        draw.text((index * (PANEL_WIDTH + 6) + 2, 3), name, fill=(70, 76, 90), font=ImageFont.load_default(size=16))
    return np.vstack([np.asarray(caption), *strips])


def page(run: Run) -> str:
    """The report as one HTML page without external resources."""
    scores = run.tally.scores()
    sections = [f"<h1>{_text(run.title)}</h1>", f'<p class="soft">{_text(_subtitle(run))}</p>']
    sections += [f"<p>{_text(line)}</p>" for line in (run.about_model, run.broke_off) if line]
    sections.append(_cards(run, scores))
    if scores:
        sections.append(_score_section(run, scores))
        sections.append(_calibration_section(run))
    if run.tally.pictures:
        sections.append("<h2>Frames</h2>")
        sections.append('<p class="soft">Evenly spread over the recording, not chosen by their score. '
                        "The three depth pictures of a frame share its scale.</p>")  # fmt: skip
        sections += [_frame_section(frame, run) for frame in run.tally.pictures]
    if len(run.tally.frames) > 1:
        sections.append(_time_section(run))
    depth = {f"{name}": value for name, value in scores.get("depth", {}).items()}
    sections.append('<div class="two">')
    between = scores.get("densified", {})
    sections += [_table("Depth at asked points" if between else "Depth", depth)] if depth else []
    sections += [_table("Depth between asked points, filled in", _between_rows(between))] if between else []
    sections += [_table("Run", run.figures), _table("Environment", run.environment), "</div>"]
    if run.notes:
        sections.append("<h2>Notes</h2><ul>" + "".join(f"<li>{_text(note)}</li>" for note in run.notes) + "</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{_text(run.title)}</title><style>{_STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _subtitle(run: Run) -> str:
    shown = [run.environment.get(name, "") for name in ("model", "dialect", "device", "dtype", "date")]
    return " · ".join(value for value in shown if value)


def _cards(run: Run, scores: dict) -> str:
    figures = run.figures
    cards = []
    if scores:
        depth = scores["depth"]
        cards += [(_short(depth["delta1"]), "δ1, within a factor 1.25"), (_short(depth["abs_rel"]), "AbsRel")]
        cards += [(_short(depth["rmse"]), "RMSE, m")]
    cards.append((f"{figures['points_per_second']:,.0f}".replace(",", "\u202f"), "points a second"))
    if "frames_sent" in figures:
        cards.append((f"{figures['frames_answered']} / {figures['frames_sent']}", "frames answered / sent"))
        cards.append((str(figures["frames_dropped"]), "frames dropped"))
    if "latency_p50_s" in figures:
        cards.append((f"{figures['latency_p50_s'] * 1000:.0f} ms", "median latency"))
    inner = "".join(f'<div class="card"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for value, name in cards)
    return f'<div class="cards">{inner}</div>'


def _score_section(run: Run, scores: dict) -> str:
    interval = scores["delta1_interval_95"]
    baselines = scores["baselines"]
    constant = baselines["best_constant"]
    rows = [
        ("model", scores["depth"]["delta1"], tuple(interval) if interval else None),
        (f"always {constant['metres']:.2g} m", constant["delta1"], None),
        ("mean of the image row", baselines["row_prior"]["delta1"], None),
    ]
    predicted, true = run.tally.pairs()
    coverage = (
        f"Compared: {scores['compared']} of {scores['labels']} true depths, those at asked pixels; "
        f"{scores['depth']['answered']} have an answer, the others count as wrong."
    )
    return (
        '<div class="two"><div class="box"><h2 style="margin-top:0">δ1 beside baselines</h2>'
        f'{charts.bars(rows)}<p class="soft">Baselines: {_text(baselines["note"])}. '
        f"The whisker holds 95 % of draws of the images. {coverage}</p></div>"
        '<div class="box"><h2 style="margin-top:0">Predicted over true depth</h2>'
        f"{charts.error_histogram(predicted, true)}"
        '<p class="soft">Logarithmic; green counts as right in δ1.</p></div></div>'
    )


def _between_words(between: dict) -> str:
    depth, near = between["depth"], between["near_edges"]
    words = (
        f"{_number(depth['delta1'])}{_interval_words(between)}, AbsRel {_number(depth['abs_rel'])}: filled in between "
    )
    words += f"the asked points, {between['pixels']} pixels, {depth['answered']} with a depth"
    return words + (f"; near edges {_number(near['depth']['delta1'])}{_interval_words(near)}" if near else "")


def _between_rows(between: dict) -> dict:
    near = between["near_edges"]
    rows = {"pixels": between["pixels"], "δ1, 95 % of image draws": _interval_words(between).strip(" ()") or None}
    rows |= between["depth"]
    if near:
        rows |= {f"{name}, near edges": near["depth"][name] for name in ("delta1", "abs_rel", "rmse")}
        rows["δ1 near edges, 95 % of image draws"] = _interval_words(near).strip(" ()") or None
    return rows


def _interval_words(scores: dict) -> str:
    interval = scores["delta1_interval_95"]
    return f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""


def _calibration_words(calibration: dict) -> str:
    error = calibration["error_calibrated"]
    after = "needs a second image" if error is None else f"{error:.3f} calibrated on other images"
    return f"expected error of the confidence: {calibration['error_stated']:.3f} as stated, {after}"


def _calibration_section(run: Run) -> str:
    calibration = run.tally.calibration()
    if not calibration:
        return ""
    curves = [
        (f"{name}, expected error {calibration[f'error_{name}']:.3f}", table["confidence"], table["right"])
        for name in ("stated", "calibrated")
        if (table := calibration[name]) is not None
    ]
    return (
        '<div class="box" style="margin-top:16px"><h2 style="margin-top:0">What a confidence is worth</h2>'
        f"{charts.reliability_chart(curves)}"
        '<p class="soft">Share of depths within a factor 1.25 of the truth, over groups of equal size by confidence; '
        "on the diagonal a confidence is what it says. Calibrated: each image by a curve fitted to the others. "
        f"{calibration['points']} depths in {calibration['frames']} images.</p></div>"
    )


def _frame_section(frame: AnsweredFrame, run: Run) -> str:
    near_m, far_m = _scale(frame)
    panels = "".join(
        f'<figure><img src="{charts.data_url(panel)}" alt="{name}"><figcaption>{name}</figcaption></figure>'
        for name, panel in _panels(frame)
    )
    row = next((row for row in run.tally.frames if row["name"] == frame.name), {})
    facts = [f"{row.get('points', 0)} points", f"{frame.latency_s * 1000:.0f} ms"]
    facts += [f"δ1 {row['delta1']:.3f}"] if row.get("delta1") is not None else []
    return (
        f'<div class="box frame"><h3>{_text(frame.name)} <span>· {_text(" · ".join(facts))}</span></h3>'
        f'<div class="panels">{panels}</div><div class="scale">{charts.scale_bar(near_m, far_m)}</div></div>'
    )


def _time_section(run: Run) -> str:
    latency_ms = [frame["latency_s"] * 1000 for frame in run.tally.frames]
    boxes = f'<div class="box"><h3>Latency</h3>{charts.strip(latency_ms, max(latency_ms), " ms")}</div>'
    if any(frame["delta1"] is not None for frame in run.tally.frames):
        values = [frame["delta1"] for frame in run.tally.frames]
        boxes = f'<div class="box"><h3>δ1</h3>{charts.strip(values, 1.0, "")}</div>' + boxes
    return f'<h2>Frame by frame</h2><div class="two">{boxes}</div>'


def _panels(frame: AnsweredFrame) -> list[tuple[str, np.ndarray]]:
    near_m, far_m = _scale(frame)
    predicted = frame.depth_map_m if frame.depth_map_m is not None else _as_map(frame)
    shown = np.arange(len(frame.pixels))
    if len(shown) > MOST_DOTS:
        shown = np.random.default_rng(0).choice(shown, MOST_DOTS, replace=False)
    asked = overlay(frame.image, frame.pixels[shown], frame.depth_m[shown], near_m=near_m, far_m=far_m)
    caption = "asked pixels" if len(shown) == len(frame.pixels) else f"{MOST_DOTS} of {len(frame.pixels)} asked pixels"
    panels = [
        ("input", frame.image),
        (f"{caption}, coloured by depth", asked),
        ("predicted depth", charts.paint_depth(predicted, frame.image, near_m, far_m)),
    ]
    if frame.truth_m is not None:
        panels.append(("true depth", charts.paint_depth(frame.truth_m, frame.image, near_m, far_m)))
    return panels


def _scale(frame: AnsweredFrame) -> tuple[float, float]:
    """Near and far end of a frame's colours: of its truth where there is one, so that a wrong scale shows."""
    known = frame.truth_m is not None and np.isfinite(frame.truth_m).any()
    return depth_range(frame.truth_m if known else frame.depth_m)


def _as_map(frame: AnsweredFrame) -> np.ndarray:
    depth_map = np.full(frame.image.shape[:2], np.nan, np.float32)
    columns, rows = _cells(frame).T
    depth_map[rows, columns] = frame.depth_m
    return depth_map


def _cells(frame: AnsweredFrame) -> np.ndarray:
    height, width = frame.image.shape[:2]
    return np.clip(np.rint(frame.pixels).astype(int), 0, (width - 1, height - 1))


def _coloured_points(frame: AnsweredFrame) -> tuple[np.ndarray, np.ndarray]:
    columns, rows = _cells(frame).T
    return frame.camera.unproject(frame.pixels, frame.depth_m), frame.image[rows, columns]


def _table(title: str, values: dict) -> str:
    rows = "".join(
        f"<tr><td>{_text(_words(name))}</td><td>{_text(_number(value))}</td></tr>" for name, value in values.items()
    )
    return f"<div><h2>{_text(title)}</h2><table>{rows}</table></div>"


def _words(name: str) -> str:
    return {"delta1": "δ1", "delta2": "δ2", "delta3": "δ3", "abs_rel": "AbsRel", "rmse": "RMSE, m"}.get(
        name, name.replace("_", " ")
    )


def _number(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _text(value: object) -> str:
    return html.escape(str(value))
