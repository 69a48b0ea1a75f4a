"""report.html: a training run on one page, made from nothing but the files in its run directory."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.reporting import html_page, plots
from pcpo_fast.reporting.diversity_figure import diversity_figure
from pcpo_fast.reporting.progress import duration
from pcpo_fast.reporting.reward_spread import reward_spread_figure
from pcpo_fast.reporting.run_files import RunFiles, embeddable, number_at, read_run
from pcpo_fast.reporting.series import series
from pcpo_fast.reporting.summary import summarize
from pcpo_fast.reporting.svg import inline_svg

_MOST_GRIDS = 24


def write_report(run_dir: Path | str) -> Path:
    """Write ``report.html`` into a run directory (also of a run that is still going on or was stopped); returns it.

    One self-contained file: images and figures are inside, no request goes out when it is opened, and everything that
    comes from the run's files is escaped. Parts whose files are missing say so. Values of config keys that look like
    passwords or keys are not shown. Raises `UserError` if `run_dir` is not a run directory, or metrics.jsonl is damaged
    in the middle (a cut last line is fine).
    """
    run = read_run(Path(run_dir))
    path = run.folder / "report.html"
    write_atomically(path, render(run))
    return path


def render(run: RunFiles) -> str:
    """The report as HTML."""
    numbers = summarize(run.records) | {key: value for key, value in run.summary.items() if value is not None}
    sections = [
        html_page.section("At a glance", "", _headline(run, numbers)),
        html_page.section(
            "Before and after",
            "The same captions and the same initial noise, before the first update and after the last.",
            _before_after(run),
            "There is no before/after sheet (images/before_after.png).",
        ),
        html_page.section(
            "Reward",
            "What the rollouts of each epoch scored, and what the policy scored on captions and seeds that are never "
            "trained on.",
            _figures(run, [("reward", plots.reward_figure, "Reward over epochs"), *_REWARD_PARTS]),
            "No epoch was finished and nothing was evaluated.",
        ),
        html_page.section(
            "Clip fraction per step",
            "Share of (image, step) pairs whose update was clipped, by sampling step. One clip range serves all, so a "
            "step clips more the larger its log-ratio grows: with its credit, and with the change of its output.",
            _figures(run, [("clip", plots.clip_fraction_figure, "Clip fraction per step and epoch")]),
        ),
        html_page.section(
            "Credit per step", _credit_text(run), _credit(run), "There is no credit.json that can be read."
        ),
        html_page.section(
            "Samples over time",
            "The same captions and seeds at every evaluation.",
            _samples(run),
            "There are no sample grids (images/epoch_*.png).",
        ),
        html_page.section(
            "Diversity",
            "Images of one held-out prompt that become alike are collapse, whatever the reward says. The distance to "
            "the base model's images (same prompts, same noise) says how far the policy has moved for its reward.",
            _figures(run, [("diversity", diversity_figure, "Diversity and distance to the base model over epochs")]),
            "Nothing was evaluated (prompts.heldout).",
        ),
        html_page.section(
            "Health of the optimization",
            "Rollout and update should compute the same outputs: a mismatch shifts the log-ratio. Skipped updates had "
            "a loss or gradient that was not finite.",
            _health(run, numbers),
        ),
        html_page.section(
            "Time",
            "Where an epoch's time goes, and how many images per second come out of it.",
            _figures(run, [("time", plots.time_figure, "Seconds per phase and images per second, over epochs")]),
        ),
        html_page.section("Details", "", _details(run)),
    ]
    return html_page.page(run.folder.resolve().name, _subtitle(run, numbers), sections, _footer(run))


Drawing = tuple[str, Callable[[list[dict[str, Any]]], Any], str]
_REWARD_PARTS: list[Drawing] = [
    ("rewards", plots.reward_parts_figure, "Each reward over epochs"),
    ("spread", reward_spread_figure, "What each reward has to say in the sum, over epochs"),
]


def _figures(run: RunFiles, drawings: list[Drawing]) -> str:
    parts = []
    for name, draw, description in drawings:
        figure = draw(run.records)
        if figure is not None:
            parts.append(f"<figure>{inline_svg(figure, name, description)}</figure>")
    return f'<div class="plots">{"".join(parts)}</div>' if parts else ""


def _subtitle(run: RunFiles, numbers: dict[str, Any]) -> str:
    planned = number_at(run.config, "train", "epochs")
    done = numbers["epochs"]
    of = f" of {planned:.0f}" if planned is not None and planned != done else ""
    state = "finished" if run.finished else "not finished"
    credit = f", {run.credit.rule} credit on the {run.credit.sampler} sampler" if run.credit else ""
    return f"PCPO training run, {state}: {done}{of} epochs{credit}"


def _headline(run: RunFiles, numbers: dict[str, Any]) -> str:
    items = []
    held = numbers.get("heldout_reward_before"), numbers.get("heldout_reward_after")
    if _is_number(held[0]):
        items.append((_change(*held), "held-out reward, before and after"))
    elif _is_number(numbers.get("reward_before")):
        items.append(
            (_change(numbers["reward_before"], numbers["reward_after"]), "rollout reward, first and last epoch")
        )
    items.append((html_page.text(numbers["epochs"]), "epochs"))
    if _is_number(numbers.get("images_per_second")):
        items.append((html_page.text(f"{numbers['images_per_second']:.3g}"), "images/s (median)"))
    if _is_number(numbers.get("seconds")):
        items.append((html_page.text(duration(numbers["seconds"])), "training time"))
    clipped = series(run.records, "policy/clip_fraction")
    if clipped:
        mean = sum(clipped.values) / len(clipped.values)
        items.append((html_page.text(f"{mean:.1%}"), "clip fraction (mean)"))
    memory = series(run.records, "memory/peak_gib")
    if memory:
        items.append((html_page.text(f"{max(memory.values):.3g} GiB"), "peak memory"))
    return html_page.headline(items)


def _change(before: Any, after: Any) -> str:
    if not _is_number(after):
        return html_page.text(f"{before:.3f} → –")
    change = after - before
    css = "up" if change > 0 else "down" if change < 0 else ""
    return f'{before:.3f} → {after:.3f} <span class="{css}">{change:+.3f}</span>'


def _before_after(run: RunFiles) -> str:
    found = embeddable(run, run.folder / "images" / "before_after.png")
    if found is None:
        return ""
    data, kind = found
    return html_page.picture(data, kind, _alt("Samples before and after training", run))


def _samples(run: RunFiles) -> str:
    grids = run.grids()
    if len(grids) > _MOST_GRIDS:  # the first, the last, and evenly in between
        places = [round(i * (len(grids) - 1) / (_MOST_GRIDS - 1)) for i in range(_MOST_GRIDS)]
        grids = [grids[place] for place in places]
    rewards = series(run.records, "heldout/reward/mean").by_epoch()
    figures = []
    for epoch, path in grids:
        found = embeddable(run, path)
        if found is None:
            continue
        label = f"after {epoch} epoch{'' if epoch == 1 else 's'}" if epoch else "before training"
        caption = label + (f", held-out reward {rewards[epoch]:.3f}" if epoch in rewards else "")
        figures.append(html_page.picture(*found, _alt(f"Samples {label}", run), caption, label))
    return html_page.slideshow(figures, "Epochs trained")


def _alt(what: str, run: RunFiles) -> str:
    if not run.captions:
        return what
    more = f" and {len(run.captions) - 4} more" if len(run.captions) > 4 else ""
    return f"{what}: {'; '.join(run.captions[:4])}{more}"


def _credit_text(run: RunFiles) -> str:
    if run.credit is None:
        return ""
    native = [value for value in run.credit.native if value > 0]
    spread = f" It differs by a factor of {max(native) / min(native):.3g} between steps here." if native else ""
    return (
        "The native credit |b| / std is the factor with which the sampler happens to scale a step's gradient."
        f"{spread} The proportionate credit gives every step its share of time instead."
    )


def _credit(run: RunFiles) -> str:
    credit = run.credit
    if credit is None:
        return ""
    figure = plots.credit_figure(
        credit.times,
        credit.native,
        credit.proportionate,
        credit.zeta,
        f"{credit.sampler} sampler, {len(credit.native)} steps",
        trained_steps=credit.trained_steps,
        used=[abs(value) for value in credit.used] if credit.used is not None else None,
    )
    return f"<figure>{inline_svg(figure, 'credit', 'Native and proportionate credit of every step')}</figure>"


def _health(run: RunFiles, numbers: dict[str, Any]) -> str:
    masks = bool(series(run.records, "rollout/mismatch_divergence"))  # the log-ratio then has no clip range
    clip_range = None if masks else number_at(run.config, "credit", "clip_range")
    figures = _figures(
        run,
        [
            (
                "mismatch",
                lambda records: plots.mismatch_figure(records, clip_range),
                "Mismatch between rollout and update",
            ),
            ("gradient", plots.gradient_figure, "Gradient norm of every update"),
        ],
    )
    counts = ""
    if numbers["updates"]:
        skipped = numbers["skipped_updates"]
        said = "No update was skipped." if not skipped else f"Skipped updates: {skipped} of {numbers['updates']}."
        counts = f"<p>{html_page.text(said)}</p>"
    dropped = sum(series(run.records, "scoring/dropped_groups").values)
    if dropped:
        counts += f"<p>{html_page.text(f'Groups left out because a reward failed: {dropped:.0f}.')}</p>"
    return figures + counts


def _details(run: RunFiles) -> str:
    parts = []
    epochs = [record for record in run.records if record.get("kind") == "epoch"]
    if epochs:
        rows = [(name, _shown(value)) for name, value in epochs[-1].items() if name not in ("kind", "epoch")]
        parts.append(html_page.folded(f"All numbers of epoch {epochs[-1].get('epoch')}", html_page.table(rows)))
    if run.captions:
        items = "".join(f"<li>{html_page.text(caption)}</li>" for caption in run.captions)
        parts.append(html_page.folded("Held-out captions", f"<ol>{items}</ol>"))
    if run.config_text:
        parts.append(
            html_page.folded("The whole configuration (config.yaml)", f"<pre>{html_page.text(run.config_text)}</pre>")
        )
    if run.notes:
        items = "".join(f"<li>{html_page.text(note)}</li>" for note in dict.fromkeys(run.notes))
        parts.append(f"<h3>Notes</h3><ul>{items}</ul>")
    return "".join(parts)


def _footer(run: RunFiles) -> str:
    return "Made from config.yaml, metrics.jsonl, credit.json and images/ of the run directory by pcpo-fast report."


def _shown(value: Any) -> str:
    return f"{value:.6g}" if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
