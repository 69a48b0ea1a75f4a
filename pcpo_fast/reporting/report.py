"""report.html: a training run on one page, made from the files of its run directory."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pcpo_fast.config.wording import counted
from pcpo_fast.files.atomic import write_atomically
from pcpo_fast.reporting import plots
from pcpo_fast.reporting.charts import charts
from pcpo_fast.reporting.pages import render_page
from pcpo_fast.reporting.progress import duration
from pcpo_fast.reporting.run_files import RunFiles, embedded_sheet, is_number, number_at, read_run_files
from pcpo_fast.reporting.series import series
from pcpo_fast.reporting.summary import summarize_run
from pcpo_fast.reporting.tables import fixed_text
from pcpo_fast.runs.provenance import read_provenance

_MOST_GRIDS = 24
_TEMPLATE = Path(__file__).parent / "templates" / "report.html"


def write_report(run_dir: Path | str, *, warnings: Sequence[str] = (), running: bool = False) -> Path:
    """Write ``report.html`` into a run directory, finished or not; returns its path.

    The file is self-contained: images and figures are embedded, opening it causes no network request, and everything
    from the run's files is escaped. Sections without content are left out and named at the end. Values of config keys
    that look like passwords or API keys are hidden. Raises `UserError` if `run_dir` is not a run directory, or if
    metrics.jsonl is damaged (a partial last line is fine).

    `warnings` of the run are listed first. The page of a run that is `running` reloads itself.
    """
    run = read_run_files(Path(run_dir))
    numbers = summarize_run(run.records) | {key: value for key, value in run.summary.items() if is_number(value)}
    epochs = [record for record in run.records if record.get("kind") == "epoch"]
    more = f" and {len(run.captions) - 4} more" if len(run.captions) > 4 else ""
    strips = sorted((run.folder / "images").glob("predictions_*.png"))
    mismatches = series(run.records, "rollout/mismatch_output").values  # between rollout and update
    page = render_page(
        _TEMPLATE,
        warnings=warnings,
        running=running,
        written=f"{datetime.now():%-d %B %Y, %H:%M}",
        title=run.folder.resolve().name,
        subtitle=_subtitle(run, numbers["epochs"]),
        run=run,
        numbers=numbers,
        duration=duration,
        clip_fractions=series(run.records, "policy/clip_fraction").values,
        memory=series(run.records, "memory/peak_gib").values,
        dropped_groups=sum(series(run.records, "scoring/dropped_groups").values),
        last_epoch=epochs[-1] if epochs else None,
        captions_in_short=f": {'; '.join(run.captions[:4])}{more}" if run.captions else "",
        before_after=embedded_sheet(run, run.folder / "images" / "before_after.png"),
        samples=_samples(run),
        strips=embedded_sheet(run, strips[-1]) if strips else None,
        figures=_figures(run),
        exact=bool(mismatches) and not any(mismatches),
        provenance=read_provenance(run.folder)[-1:],
    )
    write_atomically(run.folder / "report.html", page)
    return run.folder / "report.html"


def _subtitle(run: RunFiles, done: int) -> str:
    planned = number_at(run.config, "train", "epochs")
    whole = done if planned is None else round(planned)
    epochs = f"{done} of {counted(whole, 'epoch')}" if whole != done else counted(done, "epoch")
    state = "finished" if run.finished else "not finished"
    credit = f", {run.credit.rule} credit on the {run.credit.sampler} sampler" if run.credit else ""
    return f"Training run, {state}: {epochs}{credit}"


def _samples(run: RunFiles) -> list[dict[str, Any]]:
    grids = run.grids()
    if len(grids) > _MOST_GRIDS:  # the first, the last, and evenly in between
        places = [round(i * (len(grids) - 1) / (_MOST_GRIDS - 1)) for i in range(_MOST_GRIDS)]
        grids = [grids[place] for place in places]
    rewards = series(run.records, "heldout/reward/mean").by_epoch()
    samples = []
    for epoch, path in grids:
        sheet = embedded_sheet(run, path)
        if sheet is not None:
            label = f"after {epoch} epoch{'' if epoch == 1 else 's'}" if epoch else "before training"
            caption = label + (f", held-out reward {fixed_text(rewards[epoch])}" if epoch in rewards else "")
            samples.append({"label": label, "caption": caption, "sheet": sheet})
    return samples


def _figures(run: RunFiles) -> dict[str, Markup]:
    """All figures for which there are data."""
    records, credit = run.records, run.credit
    masks = bool(series(records, "rollout/mismatch_divergence"))  # has no clip range
    clip_range = None if masks else number_at(run.config, "credit", "clip_range")
    drawn = {
        "reward": (plots.mean_reward_figure(records), "Reward over epochs"),
        "rewards": (plots.reward_parts_figure(records), "Each reward over epochs"),
        "spread": (plots.reward_spread_figure(records), "Influence of each reward on the sum, over epochs"),
        "clip": (plots.clip_fraction_figure(records), "Clip fraction per step and epoch"),
        "stepwise": (plots.stepwise_figure(records), "Gain of each step, and quality of its prediction"),
        "predictions": (
            plots.predictions_figure(records),
            "Rewards of predictions, and the size of each step's credit",
        ),
        "diversity": (plots.diversity_figure(records), "Diversity and distance to the base model over epochs"),
        "mismatch": (plots.mismatch_figure(records, clip_range), "Mismatch between rollout and update"),
        "gradient": (plots.gradient_norm_figure(records), "Gradient norm of every update"),
        "time": (plots.time_figure(records), "Seconds per phase and images per second, over epochs"),
    }
    if run.gains is not None:
        figure = plots.gain_correlation_figure(run.gains.steps, run.gains.correlations)
        drawn["gains"] = figure, "Correlation of the gains of every two steps"
    if credit is not None:
        figure = plots.credit_figure(
            credit.times,
            credit.native,
            credit.proportionate,
            credit.zeta,
            f"{credit.sampler} sampler, {counted(len(credit.native), 'step')}",
            trained_steps=credit.trained_steps,
            used=credit.used and [abs(value) for value in credit.used],
        )
        drawn["credit"] = figure, "Native and proportionate credit of every step"
    return {name: charts(figure, text) for name, (figure, text) in drawn.items() if figure is not None}
