"""The command line: demo, audit, explain, report.  Flags come from the settings table; errors are one message."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pfungst.errors import DataError, PfungstError, SettingError
from pfungst.flags import setting_flags
from pfungst.terminal import (
    print_confirmation,
    print_demo,
    print_explanations,
    print_findings,
    print_placements,
    show_progress,
    show_warnings,
)

_OWN = "own"  # --model without a value: the run's own
_ANSWERS = ["cheat", "legitimate", "unsure", "withdrawn"]

_MODEL_HELP = """MODEL is one of

\b
  torchvision:resnet50        with its pretrained weights, or --weights FILE
  timm:NAME                   the same
  hf:NAME                     the same, for image classifiers of transformers, or a folder
  path/file.py:function       a function without arguments that returns an nn.Module
  package.module:function     the same
  FILE.pt2                    a torch.export program

--weights takes .safetensors, or .pt/.pth with a state dict (pickled code is never run)."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pfungst")
def cli() -> None:
    """Show what a trained vision model really looks at, find its systematic cheats, and prove or refute each.

    \b
    First time?           pfungst demo
    Your model:           pfungst audit torchvision:resnet50 images/ --out runs/first
    A few pictures:       pfungst explain torchvision:resnet50 dog.jpg --out maps
    Is the map right?     pfungst evaluate torchvision:resnet50 images/ --out quality
    Better maps:          pfungst tune torchvision:resnet50 images/ --out rules.json
    """


@cli.command(
    epilog="Example:  pfungst audit torchvision:resnet50 photos/ --out runs/photos --target predicted --limit 2000",
    help="Audit MODEL on IMAGES: find groups of pictures that it recognises in a way of their own, and test each by "
    "experiment.\n\nIMAGES is a folder with one subfolder a class, a flat folder, or a .csv/.parquet manifest with "
    "the columns path and label (further columns are kept).\n\n" + _MODEL_HELP + "\n\nThe same command again goes on "
    "where it was stopped.",
)
@click.argument("model")
@click.argument("images", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Run folder; report.html and findings.json go there.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON and nothing else.")
@setting_flags()
def audit(model: str, images: str, out: str, as_json: bool, **settings: Any) -> None:
    from pfungst.pipeline import audit as run_audit

    with show_progress(quiet=as_json) as progress:
        result = run_audit(model, images, out=out, progress=progress, **settings)
    if as_json:
        content = result.run.read_findings()
        found = result.recognition
        content |= {"findings": [one.record for one in result.findings], "recognition": found and found.record()}
        content["notes"] = list(result.subject.data.notes)
        click.echo(json.dumps(content, indent=1))
        return
    print_findings(result)


@cli.command(
    epilog="Example:  pfungst explain torchvision:resnet50 dog.jpg cat.jpg --out maps --targets predicted,tabby",
    help="Write heatmaps, overlays and a sheet for each IMAGE (files or folders).\n\nPictures that cannot be read are "
    "named and left out, the others explained; the exit code is 1 if one of the files given here is among them, or all "
    "are.\n\n" + _MODEL_HELP,
)
@click.argument("model")
@click.argument("images", nargs=-1, required=True, type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder for the pictures and explanations.json.")
@click.option(
    "--targets",
    default="predicted",
    show_default=True,
    help="What is explained, separated by commas: predicted, top3, class names or indices.",
)
@click.option("--topk", default=5, show_default=True, type=click.IntRange(1, 50), help="Predictions shown beside.")
@click.option("--same-scale", is_flag=True, help="One colour scale for all pictures, so that they compare.")
@click.option(
    "--save",
    default="none",
    show_default=True,
    type=click.Choice(["none", "npy", "safetensors"]),
    help="Also save the relevance itself, (channels, height, width).",
)
@click.option(
    "--window",
    default=None,
    type=click.IntRange(1),
    help="For pictures larger than the model's input: slide a window of this side over them, in their pixels.",
)
@click.option("--stride", default=None, type=click.IntRange(1), help="Pixels between windows. [default: half of one]")
@click.option("--pyramid", default=None, type=click.Path(), help="Folder for deep-zoom tiles of windowed pictures.")
@setting_flags({"weights", "size", "mean", "std", "channels", "classes", "preset", "batch_size", "device"})
def explain(model: str, images: tuple[str, ...], out: str, **options: Any) -> None:
    from pfungst.explain import explain as run_explain

    options["targets"] = _parts(options["targets"])
    with show_progress() as progress:
        found = run_explain(
            model,
            [Path(image) for image in images],
            Path(out),
            progress=lambda done, total: progress("explaining", done, total),
            **options,
        )
    print_explanations(found, Path(out))
    named = {Path(image).expanduser() for image in images}
    if missed := [one for one in found if one.skipped and one.path in named]:
        raise DataError(f"{len(missed)} of the files given could not be explained, e.g. {missed[0].path}: "
                        f"{missed[0].skipped}", "check the names")  # fmt: skip
    if all(one.skipped for one in found):
        raise DataError("none of the pictures could be read", "convert them to PNG or JPEG")


@cli.command(
    epilog="Example:  pfungst evaluate torchvision:resnet50 photos/ --out quality --methods auto,epsilon,grad-cam "
    "--measures srg,localisation --masks photos.json",
    help="Judge ways to explain MODEL on IMAGES: which map is right?\n\nEvery method is measured on your own model and "
    "pictures, beside controls that know nothing of the model, with intervals; the table, curves and examples go to "
    "OUT/evaluation.html. In place of MODEL and IMAGES, the folder of a finished run.\n\n" + _MODEL_HELP + "\n\nThe "
    "same command again goes on where it was stopped.",
)
@click.argument("model")
@click.argument("images", required=False, type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="Folder for the page, the tables, and what is finished.")
@click.option(
    "--methods",
    default="",
    help="Presets of LRP (names or files); gradient, gradient-x-input, guided-backprop, deconvnet, "
    "grad-cam or grad-cam:LAYER, integrated-gradients:STEPS, smoothgrad:DRAWS, occlusion:PIXELS, deeplift. "
    "[default: auto,epsilon and the usual ones]",
)
@click.option(
    "--measures",
    default=None,
    help="Of srg, region-perturbation, pixel-flipping, localisation, robustness, complexity, class-sensitivity, "
    "randomisation, conservation. [default: the cheap ones; localisation where there are masks]",
)
@click.option(
    "--masks", default=None, type=click.Path(), help="Where the objects are: a folder of masks, COCO, YOLO or VOC XML."
)
@click.option("--objects", default="", help="Only these annotated categories, separated by commas.")
@click.option(
    "--relevance", multiple=True, type=click.Path(), help="Maps made elsewhere, judged too: .npz, .npy, .h5, .zarr, ..."
)
@click.option(
    "--target",
    default=None,
    type=click.Choice(["predicted", "label"]),
    help="Whose score is explained. [default: predicted; of a run, as it was]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON and nothing else.")
@setting_flags(
    {"weights", "size", "mean", "std", "channels", "classes", "batch_size", "device", "limit", "workers", "seed"}
)
def evaluate(model: str, images: str | None, out: str, as_json: bool, **options: Any) -> None:
    from pfungst.evaluations import evaluate as run_evaluation
    from pfungst.sheets import describe_evaluation, write_evaluation
    from pfungst.tables import tabulate
    from pfungst.terminal import print_evaluation

    for name in ("methods", "measures", "objects"):
        options[name] = _parts(options[name]) if options[name] else None
    with show_progress(quiet=as_json) as tell:
        found = run_evaluation(model, images, out=out, progress=tell, **options)
    table = tabulate(found)
    page = write_evaluation(found, out, table)
    if as_json:
        click.echo(json.dumps(describe_evaluation(found, table), indent=1))
    else:
        print_evaluation(found, table, page)


@cli.command(
    epilog="Example:  pfungst tune torchvision:resnet50 photos/ --out resnet50.json --masks photos_masks/",
    help="Search the rules for each group of layers of MODEL that explain IMAGES best, and write a preset file.\n\n"
    "Half of the pictures are searched on, the other half says whether the result beats the named presets; if it does "
    "not, the best of these is written. --preset FILE of audit, explain and --methods FILE of evaluate take it.\n\n"
    + _MODEL_HELP
    + "\n\nThe same command again goes on where it was stopped.",
)
@click.argument("model")
@click.argument("images", type=click.Path())
@click.option("--out", required=True, type=click.Path(), help="The preset file, NAME.json; NAME.tuning/ tells all.")
@click.option("--masks", default=None, type=click.Path(), help="Where the objects are, as of evaluate.")
@click.option("--objects", default="", help="Only these annotated categories, separated by commas.")
@click.option(
    "--objective",
    default="srg=1,localisation=1,class=1",
    show_default=True,
    help="Weights of SRG, of the relevance on the object (with --masks), and of telling classes apart.",
)
@click.option("--groups", default=3, show_default=True, type=click.IntRange(1), help="Parts of the convolutions.")
@click.option("--budget", default=80, show_default=True, type=click.IntRange(1), help="Presets tried at most.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(8), help="Pictures used at most.")
@click.option("--target", default="predicted", show_default=True, type=click.Choice(["predicted", "label"]))
@click.option("--json", "as_json", is_flag=True, help="Print all that was tried as JSON and nothing else.")
@setting_flags({"weights", "size", "mean", "std", "channels", "classes", "batch_size", "device", "workers", "seed"})
def tune(model: str, images: str, out: str, as_json: bool, **options: Any) -> None:
    from pfungst.terminal import print_tuning
    from pfungst.tuning import parse_objective
    from pfungst.tuning import tune as run_search

    options["objects"] = _parts(options["objects"])
    options["objective"] = parse_objective(options["objective"])
    with show_progress(quiet=as_json) as tell:
        found = run_search(model, images, out=out, progress=tell, **options)
    if as_json:
        click.echo(json.dumps(found.record(), indent=1))
    else:
        print_tuning(found, out)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@cli.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
def report(run: str) -> None:
    """Write RUN/report.html again from the run's stored results: one file, no network."""
    from pfungst.reports import write_report
    from pfungst.store import Run

    click.echo(f"Report: {write_report(Run(run))}")


@cli.command(epilog="Example:  pfungst view runs/before runs/after --port 8000 --model")
@click.argument("run", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="On 127.0.0.1. [default: any that is free]")
@click.option("--images", default=None, type=click.Path(), help="Where the pictures are now, if moved.")
@click.option(
    "--model",
    is_flag=False,
    flag_value=_OWN,
    default=None,
    metavar="[MODEL]",
    help="Load the run's model to try something in the page; with a value, another one. [default: no model]",
)
@click.option("--weights", default=None, type=click.Path(), help="Weights of that model, if moved or others.")
@click.option("--device", default=None, help="Where that model runs. [default: as in the audit]")
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page.")
def view(
    run: tuple[str, ...],
    port: int,
    images: str | None,
    model: str | None,
    weights: str | None,
    device: str | None,
    browser: bool,
) -> None:
    """Look at finished RUNs in the browser, and judge their findings with the keyboard.

    With --model, after the RUNs, regions can be cut and pasted in the page, and groups of your own tested.

    The page is on this machine alone. From another one, forward the port:  ssh -L 8000:127.0.0.1:8000 HOST
    """
    from pfungst.viewer.laboratory import Asked
    from pfungst.viewer.server import serve

    if model is not None and (Path(model) / "run.json").exists():
        raise SettingError(f"--model {model} is a run", "give --model after the RUNs")
    asked = Asked(None if model == _OWN else model, weights, device) if model or weights else None

    def tell(address: str) -> None:
        click.echo(f"Open {address}\nCtrl-C ends the viewer.", err=True)

    try:
        serve(run, port=port, images=images, model=asked, browser=browser, tell=tell)
    except KeyboardInterrupt:  # how a viewer ends; nothing is left undone
        click.echo("\nStopped.", err=True)


@cli.command(epilog="Example:  pfungst compare runs/before runs/after")
@click.argument("left", type=click.Path(exists=True, file_okay=False))
@click.argument("right", type=click.Path(exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON and nothing else.")
def compare(left: str, right: str, as_json: bool) -> None:
    """Findings that the run RIGHT kept, lost and gained against LEFT, and the decisions that changed.  No model."""
    from pfungst.comparisons import compare_runs, tell_comparison
    from pfungst.store import Run

    found = compare_runs(Run(left), Run(right))
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(tell_comparison(found)))


@cli.command(epilog="Example:  pfungst judge runs/photos f001 cheat --note 'the source tag at the bottom'")
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.argument("finding")
@click.argument("answer", metavar="cheat|legitimate|unsure|withdrawn", type=click.Choice(_ANSWERS))
@click.option("--note", default="", help="Why, in words.")
@click.option("--by", default=None, help="Who says so. [default: the user of the system]")
def judge(run: str, finding: str, answer: str, note: str, by: str | None) -> None:
    """Say what a FINDING of a RUN is, after you looked: kept in RUN/judgements.jsonl, which no audit overwrites."""
    from pfungst.pipeline import judge as write_down
    from pfungst.store import Run

    said = write_down(Run(run), finding, answer, note=note, by=by)
    click.echo(f"{said.finding}, class {said.class_name}: {said.answer}, says {said.by} ({said.at})")


@cli.command(epilog="Example:  pfungst export runs/photos --to virelay --out photos-virelay --findings f001,f003")
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.option("--to", required=True, help="Format: csv, parquet, coco (files); fiftyone, spotlight, virelay (folders).")
@click.option("--out", required=True, type=click.Path(), help="File or folder to write; nothing is overwritten.")
@click.option("--findings", default="", help="Export the members of these findings only, separated by commas.")
@click.option("--images", default=None, type=click.Path(), help="Where the pictures are now, if moved.")
def export(run: str, to: str, out: str, findings: str, images: str | None) -> None:
    """Write a finished RUN for another tool: tables, COCO, FiftyOne, Spotlight, ViRelAy.  Needs no model."""
    from pfungst.exports import export as write_export
    from pfungst.store import Run

    write_export(Run(run), to, out, findings=_parts(findings), images=images)
    click.echo(f"Exported to {out}")


def _reopening(function: Callable[..., Any], what: str = "finding") -> Callable[..., Any]:
    """Arguments and options of the commands that go on with a finished run, and with ``what`` of it."""
    for decorate in (
        click.option("--device", default=None, help="Where the model runs. [default: as in the audit]"),
        click.option("--images", default=None, type=click.Path(), help="Where the pictures are now, if moved."),
        click.option("--weights", default=None, type=click.Path(), help="Weights of the model, if moved or others."),
        click.option("--model", default=None, help="Another model than the run's. [default: the same again]"),
        click.argument(what),
        click.argument("run", type=click.Path(exists=True, file_okay=False)),
    ):
        function = decorate(function)
    return function


@cli.command(epilog="Example:  pfungst confirm runs/photos f001 --seed 7 --also timm:resnet50 --where other_photos/")
@_reopening
@click.option("--seed", default=None, type=click.IntRange(0), help="Of the draws. [default: the run's, and one more]")
@click.option("--samples", default=None, type=click.IntRange(8), help="Pictures of each role. [default: as in the run]")
@click.option("--also", multiple=True, help="Ask this model about the same changed pictures, too.")
@click.option("--also-weights", multiple=True, type=click.Path(), help="Weights of each --also, in their order.")
@click.option("--also-preset", multiple=True, help="Look for the region under these rules (or a preset file), too.")
@click.option("--where", multiple=True, type=click.Path(), help="Folder in which to count how often the cue is there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and nothing else.")
def confirm(run: str, finding: str, as_json: bool, **options: Any) -> None:
    """Repeat the experiments of a FINDING of a RUN with other random draws, and ask for counter-evidence.

    Model, pictures and settings are those of the run.  The result is kept in RUN/findings/FINDING/confirmed_SEED.json.
    """
    from pfungst.runs import confirm_again

    result = confirm_again(run, finding, **options)
    if as_json:
        click.echo(json.dumps(result.record(), indent=1))
    else:
        print_confirmation(result)


@cli.command(epilog="Example:  pfungst place runs/photos new_photos/ --out placed.csv")
@functools.partial(_reopening, what="pictures")
@click.option("--out", default=None, type=click.Path(), help="Write a row a picture: .csv, .parquet or .json.")
@click.option("--target", default="auto", show_default=True, type=click.Choice(["auto", "label", "predicted"]),
              help="The class within which a picture is compared, as of audit.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON and nothing else.")
def place(run: str, pictures: str, out: str | None, as_json: bool, **options: Any) -> None:
    """Place new PICTURES (a folder or manifest) on a finished RUN: whose findings they share, how odd they are.

    The run stays as it is. Findings: those whose members a picture is like. Outlier: mean distance to the nearest
    samples of its class, 1 being as usual.  Class: the label where there are labels; with --target predicted what the
    model takes it for, which is what tells whether pictures of other classes carry a cue.
    """
    from pfungst.placements import check_table, write_table
    from pfungst.runs import place_pictures
    from pfungst.store import Run

    if out is not None:
        check_table(out)  # before the work
    with show_progress(quiet=as_json) as tell:
        placed = place_pictures(run, pictures, progress=tell, **options)
    if out is not None:
        write_table(placed, out)
    if as_json:
        click.echo(json.dumps([one.record() for one in placed], indent=1))
    else:
        print_placements(placed, Run(run), out)


@cli.command(epilog="Example:  pfungst guard runs/photos f001 --out tests/test_cue.py")
@_reopening
@click.option(
    "--out", required=True, type=click.Path(), help="The test file, .py; its pictures go into a folder beside."
)
@click.option("--count", default=16, show_default=True, type=click.IntRange(2, 99), help="Pictures of each role.")
@click.option("--seed", default=None, type=click.IntRange(0), help="Of the choice of pictures. [default: the run's]")
def guard(run: str, finding: str, out: str, **options: Any) -> None:
    """Write a pytest file that fails as long as a model uses the cue of a FINDING of a RUN.

    It needs torch, numpy, Pillow and pytest, and the folder of pictures that is written beside it.
    """
    from pfungst.runs import guard_finding

    made = guard_finding(run, finding, out, **options)
    click.echo(f"Test: {made.path}, with {3 * made.pictures} pictures in {made.folder}")
    click.echo(
        f"The run's own model {'fails' if made.fails else 'passes'} it: beyond the control the cue turns "
        f"{made.decisions:.0%} of the pictures to the class and raises its score by {made.logit:+.2f}."
    )


@cli.command()
@click.option("--out", default="pfungst-demo", show_default=True, type=click.Path(), help="Folder of the demo.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Another seed, another data set.")
@click.option("--clean-twin/--no-clean-twin", default=True, show_default=True, help="Also audit data without cues.")
def demo(out: str, seed: int, clean_twin: bool) -> None:
    """Plant three cheats in a data set, train a network on it, audit it, and say what was found and what was missed.

    Needs no download and no GPU.  The data are scikit-learn's scanned digits as noisy colour pictures; the planted
    cues are a border, a source tag and a coloured disc that moves.  A clean twin of the data, with a network of its
    own, must yield no confirmed finding.
    """
    from pfungst.demo import run_demo

    with show_progress() as progress:
        results = run_demo(Path(out), seed=seed, clean_twin=clean_twin, progress=progress)
    print_demo(results)


def main() -> None:
    """Entry point: an error of ours is printed as one message, without a traceback, and the exit code is 1."""
    try:
        with show_warnings():
            cli(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("\nStopped. The same command again goes on from here.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PfungstError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
