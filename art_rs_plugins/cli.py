"""``art-rs``: flags are parsed here, and everything else happens in ``benchmark``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from art_rs_plugins.theory.audit import Audit

app = typer.Typer(
    help="Certified classifiers by randomized smoothing: train, certify, attack, compare, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Sigma = Annotated[float, typer.Option(help="Noise level, in the units of the raw input.")]
Data = Annotated[str, typer.Option(help="digits, mnist, cifar10, or a .npz file.")]
Model = Annotated[str, typer.Option(help="cnn, mlp, resnet20, resnet56, resnet110, or package.module:factory.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="gpu (falls back to the CPU without CUDA) or cpu.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.command("demo")
def run_demo(
    output: Annotated[Path, typer.Option(help="Folder of weights, records, manifests and the report.")] = Path(
        "runs/demo"
    ),
    quiet: Quiet = False,
) -> None:
    """Train on digits, certify at sigma .25 and .5, attack the certificates, and write a report."""
    from art_rs_plugins.benchmark import demo
    from art_rs_plugins.benchmark.report import demo_table, write_report

    results = demo.demo(output, verbose=not quiet)
    records = [result.record for result in results]
    nearest = [result.nearest for result in results]
    write_report(
        records, "html", output / "report.html", audits=[result.audits for result in results], nearest=nearest
    )
    typer.echo(demo_table([(result.sigma, result.record, result.audits) for result in results]))
    typer.echo(f"\nRecords, manifests and report.html are in {output}")
    _finish([result.audits for result in results])


@app.command("train")
def run_train(
    output: Annotated[Path, typer.Option(help="Weights file, safetensors.")],
    data: Data = "digits",
    model: Model = "cnn",
    sigma: Sigma = 0.25,
    epochs: Annotated[int, typer.Option(help="Passes over the training data.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Inputs of a batch.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak of AdamW's cosine schedule.")] = 2e-3,
    seed: Seed = 0,
    device: Device = "gpu",
    method: Annotated[str, typer.Option(help="Loss: gaussian, adre, consistency or macer.")] = "gaussian",
    weight: Annotated[float | None, typer.Option(help="Of the regulariser; the authors' by default.")] = None,
    draws: Annotated[int | None, typer.Option(help="Noisy copies of an input; the authors' by default.")] = None,
    eps: Annotated[float, typer.Option(help="l2 norm of adversarial training (SmoothAdv); 0 for none.")] = 0.0,
    steps: Annotated[int, typer.Option(help="Steps of the adversary.")] = 2,
    warmup: Annotated[int, typer.Option(help="Epochs over which eps is reached.")] = 0,
    weights: Annotated[str | None, typer.Option(help="Weights to start from.")] = None,
    examples: Annotated[str, typer.Option(help="start:stop:step of the training split.")] = "::1",
    quiet: Quiet = False,
) -> None:
    """Train a network under noise."""
    from art_rs_plugins.benchmark.config import TrainConfig
    from art_rs_plugins.benchmark.training import train

    config = TrainConfig(
        data=data,
        model=model,
        sigma=sigma,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
        method=method,
        weight=weight,
        draws=draws,
        eps=eps,
        steps=steps,
        warmup=warmup,
        weights=weights,
        examples=examples,
    )
    last = train(config, output, verbose=not quiet)[-1]
    typer.echo(f"{output}: loss {last.loss:.4f}, training accuracy under noise {last.noisy_accuracy:.4f}")


@app.command()
def certify(
    output: Annotated[Path, typer.Option(help="Record, TSV; an unfinished one with the same settings is resumed.")],
    data: Data = "digits",
    model: Model = "cnn",
    weights: Annotated[str | None, typer.Option(help="safetensors, or a PyTorch state dict.")] = None,
    sigma: Sigma = 0.25,
    n: Annotated[int, typer.Option(help="Estimation draws; the most, with --radius or --tolerance.")] = 10_000,
    radius: Annotated[list[float] | None, typer.Option(help="Named radius; repeat. Stops once it is clear.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Expected loss of radius; takes as few draws.")] = None,
    n0: Annotated[int | None, typer.Option(help="Selection draws: 100, or 500 with --tolerance.")] = None,
    alpha: Annotated[float, typer.Option(help="Failure probability of one certificate.")] = 0.001,
    examples: Annotated[str, typer.Option(help="start:stop:step of the test split.")] = "::1",
    seed: Seed = 0,
    device: Device = "gpu",
    noise: Annotated[str, typer.Option(help="gaussian, or grid: exact, for inputs of 8 bits.")] = "gaussian",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; certified at it.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory layout of images.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network with torch.compile.")] = False,
    block: Annotated[int | None, typer.Option(help="Rows of one forward pass; measured by default.")] = None,
    rule: Annotated[str | None, typer.Option(help="one-sided or two-sided; the method's own by default.")] = None,
    method: Annotated[str, typer.Option(help="Estimator: smoothing, adre.")] = "smoothing",
    option: Annotated[list[str] | None, typer.Option(help="Of the estimator, name=value; repeat.")] = None,
    shard: Annotated[str | None, typer.Option(help="number/count, such as 0/3: this part of the examples.")] = None,
    ray: Annotated[str | None, typer.Option(help="Vote on Ray: local, auto, or host:port of a cluster.")] = None,
    quiet: Quiet = False,
) -> None:
    """Certify test examples of a data set, and record them; what was stopped goes on where it stopped."""
    from art_rs_plugins.benchmark import runs
    from art_rs_plugins.benchmark.cluster import RayWorkers
    from art_rs_plugins.benchmark.config import RunConfig, parse_options
    from art_rs_plugins.benchmark.report import render
    from art_rs_plugins.benchmark.shards import Shard
    from art_rs_plugins.benchmark.workers import HERE

    config = RunConfig(
        data=data,
        model=model,
        weights=weights,
        sigma=sigma,
        n=n,
        n0=(100 if tolerance is None else 500) if n0 is None else n0,
        alpha=alpha,
        examples=examples,
        seed=seed,
        device=device,
        radii=tuple(sorted(radius)) if radius else None,
        tolerance=tolerance,
        noise=cast(Any, noise),
        dtype=cast(Any, dtype),
        channels_last=channels_last,
        compile=compile,
        block=block,
        rule=rule,
        method=method,
        options=parse_options(option or []),
    )
    part = None if shard is None else Shard.parse(shard)
    try:
        with nullcontext(HERE) if ray is None else RayWorkers(ray, gpu=device == "gpu") as workers:
            record = runs.certify(config, output, verbose=not quiet, workers=workers, shard=part)
    except KeyboardInterrupt:
        typer.secho(f"stopped; what is certified is in {output}, and the same command goes on", err=True)
        raise typer.Exit(130) from None
    typer.echo(render([record], "md"))


@app.command()
def attack(
    record: Annotated[Path, typer.Argument(help="Record of art-rs certify.")],
    name: Annotated[list[str] | None, typer.Option("--attack", help="Attack; repeat. Unknown ones list all.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="l2 budget; repeat for several.")] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = 20,
    n: Annotated[int, typer.Option(help="Votes for each adversarial input.")] = 200,
    inputs: Annotated[str, typer.Option(help="start:stop:step of the inputs of the record.")] = "::1",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Attack the classifier behind a record; exits with 1 if a certificate is contradicted, or an attack failed."""
    from art_rs_plugins.benchmark import attacked
    from art_rs_plugins.benchmark.config import AttackConfig
    from art_rs_plugins.benchmark.report import audit_text

    names, budgets = tuple(name or ("pgd", "smoothed-pgd")), tuple(sorted(budget or (0.25, 0.5, 0.75, 1.0)))
    done = attacked.attack(record, [AttackConfig(names, budgets, steps, n, inputs, seed)], verbose=not quiet)
    for title, found in done.audits.items():
        typer.echo(f"\n{title}\n{audit_text(found)}")
    _finish([done.audits], done.failed)


@app.command("benchmark")
def run_benchmark(
    suite: Annotated[
        str, typer.Argument(help="A TOML file, or a suite that comes with the package; see --list.")
    ] = "benchmark-digits",
    output: Annotated[Path, typer.Option(help="Folder of weights, records and the report.")] = Path("runs/benchmark"),
    list_suites: Annotated[bool, typer.Option("--list", help="Name the suites that come with the package.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the suite and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train, certify, attack and compare the cells of a suite; a run that was stopped goes on, attack by attack."""
    from art_rs_plugins.benchmark import suite as suites

    if list_suites:
        typer.echo("\n".join(suites.names()))
        return
    if print_config:
        typer.echo(suites.text(suite))
        return
    done = suites.run(suites.read(suite), output, verbose=not quiet)
    typer.echo(done.table)
    typer.echo(f"\nRecords, leaderboard and report.html are in {output}")
    _finish(done.audits, done.failed)


@app.command()
def report(
    records: Annotated[list[Path], typer.Argument(help="Records, ours or in the format of Cohen et al.")],
    output: Annotated[Path | None, typer.Option(help="File to write; the terminal by default.")] = None,
    format: Annotated[str, typer.Option(help="html, md, csv, latex, json or parquet.")] = "html",
    merge: Annotated[Path | None, typer.Option(help="First join the records, shards of one run, into this.")] = None,
) -> None:
    """Redraw records, and the attacks on them, without a model."""
    from art_rs_plugins.benchmark.audits import load_audits
    from art_rs_plugins.benchmark.nearest import load_nearest
    from art_rs_plugins.benchmark.records import read_record
    from art_rs_plugins.benchmark.report import render, write_report

    found = [read_record(path) for path in records]
    if merge is not None:
        from art_rs_plugins.benchmark import shards

        found = [shards.merge(found, merge)]
    audits, notes = load_audits(found)
    nearest = load_nearest(found)
    if output is None:
        typer.echo(render(found, format, audits=audits, nearest=nearest, notes=notes))
    else:
        write_report(found, format, output, audits=audits, nearest=nearest, notes=notes)
    _finish(audits)


def _finish(audits: Sequence[Mapping[str, Audit] | None], failed: Mapping[str, str] | None = None) -> None:
    """Say what failed and how many certificates were contradicted, and exit with 1 if any was."""
    from art_rs_plugins.benchmark.tables import count_cases

    for name, reason in (failed or {}).items():
        typer.secho(f"FAILED {name}: {reason}", fg="red", err=True)
    joint = [found["all"] for found in audits if found]
    cases = [case for found in joint for case in found.contradictions]
    if cases:
        for case in cases:
            typer.secho(
                f"CONTRADICTION at input {case.index}: certified class {case.certified} within {case.radius:.4f}, but "
                f"{case.attack} reaches class {case.adversarial} at distance {case.distance:.4f}",
                fg="red",
                err=True,
            )
        typer.secho(f"Contradictions: {count_cases(joint)}", fg="red", err=True)
    if cases or failed:
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; user errors become one line and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(2) from error
