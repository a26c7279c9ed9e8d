"""``tdlib sweep``: a chapter over a grid, several jobs per device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DebugOption, UsageError, table


def sweep(
    grid: Annotated[Path, typer.Argument(help="YAML file of sweeps (chapter, base, grid).")],
    name: Annotated[
        list[str] | None, typer.Option(help="Only this sweep of the file; may be repeated.")
    ] = None,
    jobs_per_device: Annotated[int, typer.Option(min=1, help="Jobs that share a device.")] = 1,
    device: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda:0, cuda:1, ...; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for notebooks, logs and tables.")] = Path("runs/sweeps"),
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after this time; run again to continue.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the jobs and stop.")] = False,
    debug: DebugOption = False,
) -> None:
    """Run a chapter over a grid of parameters; what is done is not done again.

    \b
    The file:
      demo:
        chapter: primer
        base: {profile: quick}
        grid: {seed: [0, 1]}

    \b
    Examples:
      tdlib sweep grid.yaml --dry-run
      tdlib sweep grid.yaml --jobs-per-device 2 --out sweeps
    """
    from tdlib import chapters
    from tdlib.errors import TdlibError, unknown
    from tdlib.sweep import Outcome, hints, read_grid, run_jobs

    sweeps = read_grid(grid)
    for wanted in name or ():
        if wanted not in sweeps:
            raise unknown("sweep", wanted, list(sweeps))
    chosen = {key: jobs for key, jobs in sweeps.items() if not name or key in name}
    jobs = [job for group in chosen.values() for job in group]
    if dry_run:
        rows = [[job.sweep, job.cell, "done" if job.notebook(out).is_file() else "to do"] for job in jobs]
        typer.echo(table(["sweep", "job", "state"], rows))
        return
    if max_minutes is not None and max_minutes <= 0:
        raise UsageError("--max-minutes must be above 0")
    devices = device or ["cpu"]
    for hint in hints(devices, jobs_per_device):
        typer.echo(hint, err=True)
    ended = 0

    def report(outcome: Outcome) -> None:
        nonlocal ended
        ended += 1
        text = f"[{ended}/{len(jobs)}] {outcome.job.sweep} {outcome.job.cell}: {outcome.state}"
        typer.echo(
            f"{text} ({outcome.seconds:.0f} s){': ' + outcome.message if outcome.message else ''}", err=True
        )

    outcomes = run_jobs(
        jobs, out, devices=devices, per_device=jobs_per_device, max_minutes=max_minutes, report=report
    )
    rows = [[o.job.sweep, o.job.cell, o.state, f"{o.seconds:.0f}", o.message[:80]] for o in outcomes]
    typer.echo(table(["sweep", "job", "state", "seconds", "message"], rows))
    for key, group in chosen.items():
        finished = [job.notebook(out) for job in group if job.notebook(out).is_file()]
        recorded = [path for path in finished if any(path.with_suffix("").glob("*.json"))]
        if recorded:
            typer.echo(f"records: {chapters.collect(recorded, out / f'{key}.csv')}")
    unfinished = [o for o in outcomes if o.state in ("failed", "not started")]
    if unfinished:
        raise TdlibError(f"{len(unfinished)} of {len(jobs)} jobs are not done; logs are in {out}")
