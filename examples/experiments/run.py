"""Run the experiments: a table and a figure each, and a file of rows that a second run resumes.

    python examples/experiments/run.py --list
    python examples/experiments/run.py                         # all, on scikit-learn's data
    python examples/experiments/run.py least_squares cleaning --data DIR --output DIR

An experiment is a file beside this one with

    NAME                               what it is called; its docstring begins with one line
    configurations(args)               dictionaries that say, in full, what is to be measured
    measure(configuration, args)       rows of numbers, dictionaries too, of one of them
    table(rows)                        what to print
    draw(rows, path)                   the figure

Rows are kept in NAME.csv with their configuration and seed. A configuration whose rows are there is
not measured again; ``--fresh`` starts over.
"""

import argparse
import csv
import difflib
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import acceleration
import cleaning
import error_against_steps
import hyper_cleaning
import hyper_representation
import least_squares
import penalties
import poisoning
import quadratic
import stochastic_hypergradients
from data import BadInput

EXPERIMENTS = {
    experiment.NAME: experiment
    for experiment in (
        least_squares,
        error_against_steps,
        cleaning,
        penalties,
        hyper_cleaning,
        acceleration,
        stochastic_hypergradients,
        quadratic,
        hyper_representation,
        poisoning,
    )
}


def number(text):
    """A value of the CSV file as the number it was, if it was one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read(path):
    """The rows measured so far."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def write(path, rows):
    """All rows, in one move: an interrupt leaves the old file or the new one."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.with_suffix(".part").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path.with_suffix(".part"), path)


def of(rows, key):
    """The rows of one configuration and seed."""
    return [row for row in rows if all(row.get(k) == v for k, v in key.items())]


def run(experiment, args):
    """Measure what is missing, then print and draw everything that was asked for."""
    path = args.output / f"{experiment.NAME}.csv"
    keys = [{**c, "seed": args.seed} for c in experiment.configurations(args)]
    rows = read(path)
    if args.fresh:
        rows = [row for row in rows if not any(of([row], key) for key in keys)]
    missing = [key for key in keys if not of(rows, key)]
    if len(missing) < len(keys):
        print(f"{len(keys) - len(missing)} of {len(keys)} found in {path}")
    for key in tqdm(missing, desc=experiment.NAME, unit="configuration"):
        rows += [{**key, **row} for row in experiment.measure(key, args)]
        write(path, rows)
    mine = [row for key in keys for row in of(rows, key)]
    show(experiment.table(mine))
    experiment.draw(mine, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png')}")
    return mine


def show(table):
    """Print dictionaries with the same keys as a Markdown table."""
    print("\n| " + " | ".join(table[0]) + " |")
    print("|" + "---|" * len(table[0]))
    for row in table:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print()


def parse_arguments(argv):
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Run the experiments.")
    parser.error = refuse
    parser.add_argument("names", nargs="*", metavar="NAME", help="all, if none given")
    parser.add_argument("--list", action="store_true", help="one line each, and exit")
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of data sets")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default=Path("experiments_results")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument(
        "--budget", type=int, help="iterations of `cleaning`, 100,000 as published"
    )
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in EXPERIMENTS:
            close = difflib.get_close_matches(name, EXPERIMENTS, 1)
            hint = f"did you mean {close[0]!r}?" if close else "see --list"
            raise BadInput(f"no experiment {name!r}; {hint}")
    if args.data is not None and not args.data.is_dir():
        raise BadInput(f"--data {args.data} is not a folder")
    if args.budget is not None and args.budget < 1:
        raise BadInput("--budget must be at least 1")
    if args.output.exists() and not args.output.is_dir():
        raise BadInput(f"--output {args.output} is not a folder")
    return args


def refuse(message):
    """What argparse does about bad input, in one line."""
    raise BadInput(message)


def main(argv=None):
    """Run what the command line names; the rows of each experiment."""
    args = parse_arguments(argv)
    if args.list:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:20s} {experiment.__doc__.splitlines()[0]}")
        return {}
    if args.data is None:
        print("no --data DIR: experiments on data run on what scikit-learn bundles")
    args.output.mkdir(parents=True, exist_ok=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        names = args.names or EXPERIMENTS
        return {name: run(EXPERIMENTS[name], args) for name in names}
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
