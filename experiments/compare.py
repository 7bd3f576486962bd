"""Did it help? Compare the settings that runs were trained with, by what test.py wrote.

    python experiments/compare.py steps_seed?.ood.json cosine_seed?.ood.json
    python experiments/compare.py results/cifar100_seed?.ood.json mine.ood.json --score gen

Reads .ood.json files only. Runs that differ in nothing but their seed form a group; that of the
first file is the base. Draws the AUROC of every run and its accuracy by epoch. Prints, for each
group, every metric and AUROC by score; then how the codes differ; last, error rate and AUROC of
each group with the difference to the base. Exit status 1 if the picture cannot be drawn.
"""

import difflib
import glob
import json
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy import stats
from tyro.conf import Positional

DIFF_LINES = 40  # at most, of two codes

NOTE = """In brackets: 95% interval (Welch's, unpaired) of the mean difference over training seeds,
on these test images. *: significant at 5% after Holm's correction over the table. A single run,
or figures that do not vary, give neither; in parentheses: the range of the several runs."""


@dataclass
class Config:
    files: Positional[tuple[Path, ...]]  # .ood.json files
    score: str = "msp"  # by which runs are compared
    picture: Path = Path("comparison.png")  # to draw
    ignore_code: bool = False  # group by settings and data only


def main(config):
    files = []
    for file in config.files:  # or a pattern
        files += [file] if file.exists() else map(Path, sorted(glob.glob(str(file))) or [file])
    if not files:
        fail("Pass the .ood.json files of runs.")
    runs = [read(file, config) for file in files]
    digests = pd.DataFrame({run["file"]: run["digests"] for run in runs})
    for name, of_files in digests.iterrows():
        differ = of_files.dropna().drop_duplicates().index
        if len(differ) > 1:
            fail(f"{differ[0]} and {differ[1]} differ in the content of {name}.")
    runs = drop_copies(runs)
    groups = group(runs)
    for members in groups.values():
        print_group(members, config.score)
    drawn = draw(runs, groups, config)
    for name, [run, *_] in groups.items():
        lines = diff_codes(runs[0], run)
        if len(lines) > DIFF_LINES:
            lines[DIFF_LINES:] = [f"... and {len(lines) - DIFF_LINES} lines more"]
        if lines:
            print(f"The code of {name} against that of {runs[0]['file']}:", *lines, "", sep="\n")
    if len(groups) > 1:
        print_table(compare(runs, groups, config.score), f"error rate and AUROC, {config.score}")
        print(NOTE)
    names = pd.concat([run["table"].loc[config.score] for run in runs]).index.unique()
    left_out = names.difference(get_figures(runs, config.score).columns, sort=False)
    if len(left_out):
        print(f"Left out, not in every file: {', '.join(left_out)}.")
    trained_on = dict.fromkeys(run["trained_on"] for run in runs if run["training"])
    if len(trained_on) > 1:
        print(f"These runs were trained on different devices or versions: {'; '.join(trained_on)}.")
    return 0 if drawn else 1


def fail(text):
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


# Read and group -------------------------------------------------------------------------
def read(file, config):
    """Return what a file holds of a run: "table", its metrics by score and set; "setting", on
    which they depend but for the "seed"; "digests", by what must be the same in every file."""
    try:
        run = json.loads(file.read_bytes())
        sets = run["sets"]
        rows = pd.DataFrame(run["rows"]).set_index(["score", "set"])
        rows["classes"] = [sets.get(name, {}).get("effective_classes") for _, name in rows.index]
        rows = rows[[*run["metrics"], "classes"]].astype(float)
        if not all(0 <= figure <= 100 for figure in (run["error_rate"], *rows["auroc"].dropna())):
            raise ValueError("a figure is no percentage")
        log = run["training"] or {"settings": {"file": str(file)}, "epochs": []}
        if run["training"]:
            run["trained_on"] = f"{log['device']}, torch {log['versions']['torch']}"
        setting = log["settings"] | {"epochs_done": len(log["epochs"])}
        seed = str(setting.pop("seed", file))
        run["digests"] = {f"set {name}": one.get("digest") for name, one in sets.items()}
        run["digests"] |= {f"score {name}": digest for name, digest in run["scores"].items()}
        run |= {"file": str(file), "weights": run["checkpoint"]["weights"], "table": rows}
        run |= {"log": log, "setting": setting, "seed": seed}
    except OSError as error:
        fail(error)
    except (ValueError, LookupError, TypeError) as error:
        fail(f"{file} is no .ood.json file of this test.py: {str(error)[:80]}")
    if config.score not in rows.index:
        fail(f"{file} has no score {config.score}: use {', '.join(rows.index.unique('score'))}.")
    if config.ignore_code:
        setting.pop("code", None)
    return run


def drop_copies(runs):
    """Return the runs without copies of others; say which runs have equal weights."""
    kept = []
    for run in runs:
        twins = [other for other in kept if other["weights"] == run["weights"]]
        logged = all(one["training"] for one in (run, *twins))
        new = logged and all(twin["setting"] != run["setting"] for twin in twins)
        if new or not twins:
            kept.append(run)
        if twins:
            what = "the change had no effect" if new else "they count once"
            print(f"{twins[0]['file']} and {run['file']} have equal weights: {what}.\n")
    return kept


def group(runs):
    """{name: runs} of runs that differ in nothing but their seed. A name is the common start of
    their files' names; a run's "title" adds every setting in which runs differ."""
    settings = pd.DataFrame([run["setting"] for run in runs if run["training"]]).map(repr)
    differ = settings.columns[settings.nunique() > 1]
    groups = {}
    for first in runs:
        members = [run for run in runs if run["setting"] == first["setting"]]
        if members[0] is first:
            stems = [Path(run["file"]).name.removesuffix(".ood.json") for run in members]
            name = os.path.commonprefix(stems) or stems[0]
            name = first["file"] if name in groups else name
            parts = [describe(one, first, runs[0]) for one in differ if first["training"]]
            title = f"{name}: {', '.join(filter(None, parts))}".removesuffix(": ")
            groups[name] = [run | {"title": title} for run in members]
    return groups


def describe(name, run, base):
    """A setting in which runs differ, as text; "" where another one implies it."""
    value = run["setting"].get(name)
    if name == "epochs_done":
        return "" if value == run["setting"]["epochs"] else f"only {value} epochs done"
    if name == "classes":
        return f"{len(value or [])} classes"
    if name == "code":  # the first line that this code has instead
        lines = [line[1:].strip() for line in diff_codes(base, run) if line.startswith("+")]
        lines = [line for line in lines if line and not line.startswith(("++", "#", '"""'))]
        value = f"`{lines[0][:40]}`" if lines else run["log"].get("code") or "unknown"
    return f"{name} {value}"


def diff_codes(base, run):
    """The lines of a unified diff of two runs' codes; none where they are equal, or one unknown."""
    old, new = (one["log"].get("sources") for one in (base, run))
    if not old or not new or run["log"].get("code") == base["log"].get("code"):
        return []
    lines = []
    for name in sorted({*old, *new} - {"ood_data.py", "ood_utils.py"}):
        texts = old.get(name, "").splitlines(), new.get(name, "").splitlines()
        lines += difflib.unified_diff(*texts, name, name, lineterm="", n=1)
    return lines


# Print ----------------------------------------------------------------------------------
def spread(values):
    """Mean +- sample standard deviation (ddof 1) over runs; of one, its value."""
    values = np.asarray(values, dtype=float)
    if np.isnan(values).any():
        return "n/a"
    deviation = f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def print_table(table, title):
    """A DataFrame of texts as a Markdown table, its index as the first column."""
    table = table.rename_axis(title).reset_index()
    table[title] = table[title].str.replace("|", "\\|")
    table.columns = table.columns.str.replace("|", "\\|")
    align = ["left", *["right"] * (table.shape[1] - 1)]
    print(table.to_markdown(index=False, colalign=align, disable_numparse=True), end="\n\n")


def get_figures(runs, score, metric="auroc"):
    """A metric: a line per run, a column per set of all runs; means of noises and image sets."""
    lines = {run["file"]: run["table"].loc[score][metric] for run in runs}
    figures, sets = pd.concat(lines, axis=1, join="inner").T, runs[0]["sets"]
    for kind, title in (("noise", "mean of noises"), ("images", "mean of image sets")):
        of_kind = [name for name in figures if sets.get(name, {}).get("kind") == kind]
        if len(of_kind) > 1:
            figures[title] = figures[of_kind].mean(axis=1, skipna=False)
    return figures


def print_group(runs, score):
    """Every metric of a group by the score, and AUROC by every score."""
    error_rate = spread([run["error_rate"] for run in runs])
    how = f"mean +- standard deviation of {len(runs)} runs" if len(runs) > 1 else "one run"
    print(f"{runs[0]['title']}: {how}; error rate {error_rate}\n")
    titles = runs[0]["metrics"] | {"classes": "effective classes"}
    metrics = pd.concat([run["table"] for run in runs], join="inner").columns
    table = {titles[one]: get_figures(runs, score, one).agg(spread) for one in metrics}
    table = pd.DataFrame(table)
    print_table(table[~table.index.str.startswith("mean of ")], score)
    scores = runs[0]["table"].index.unique("score")
    common = [one for one in scores if all(one in run["table"].index for run in runs)]
    print_table(pd.DataFrame({one: get_figures(runs, one).agg(spread) for one in common}), "AUROC")


# Compare --------------------------------------------------------------------------------
def compare(runs, groups, score):
    """A DataFrame of texts: error rate and AUROC of each group, and differences to the first."""
    figures = get_figures(runs, score)
    figures.insert(0, "error rate", [run["error_rate"] for run in runs])
    names = {run["file"]: name for name, members in groups.items() for run in members}
    by_seed = figures.groupby([names, [run["seed"] for run in runs]], sort=False)
    by_seed = by_seed.agg(lambda values: values.mean(skipna=False))
    if len(by_seed) < len(runs):
        print("Runs of one group with the same seed are averaged first.\n")
    base, *others = groups
    pairs = pd.MultiIndex.from_product([others, figures.columns])
    tests = [compare_means(by_seed[row][base], by_seed[row][name]) for name, row in pairs]
    tests = pd.DataFrame(tests, pairs, ["text", "p"])
    tests["text"] += np.where(holm(tests["p"].tolist()), " *", "")
    table = {}
    for name, [run, *_] in groups.items():
        of_group = by_seed.loc[name]
        count = f"{len(of_group)} run{'s' if len(of_group) > 1 else ''}"
        table[f"{run['title']} ({count})"] = of_group.agg(spread)
        if name != base:
            table[f"{name} minus {base}"] = tests.loc[name]["text"]
    return pd.DataFrame(table)


def compare_means(base, other):
    """Return the difference of the means as text, with its 95% interval, and the p-value: Welch's
    test. base, other: a figure of each run, (N,) and (M,). For one run on a side, and where nothing
    varies, no interval and NaN: equal error rates on a few images are rounding, not certainty."""
    base, other = np.asarray(base), np.asarray(other)
    difference = other.mean() - base.mean()
    if np.isnan(difference):
        return "n/a", np.nan
    if min(len(base), len(other)) > 1 and np.ptp(base) + np.ptp(other) > 1e-9:
        with warnings.catch_warnings(action="ignore"):  # of a constant side
            test = stats.ttest_ind(other, base, equal_var=False)
        low, high = test.confidence_interval(0.95)
        return f"{difference:+.2f} [{low:.2f}, {high:.2f}]", test.pvalue
    several = base if len(other) == 1 else other
    span = f" ({several.min():.2f} to {several.max():.2f})" if len(several) > 1 else ""
    return f"{difference:+.2f}{span}", np.nan


def holm(p_values, level=0.05):
    """Which p-values are significant after Holm's correction, a Series; NaN never is."""
    ordered = pd.Series(p_values).sort_values()
    factors = ordered.count() - np.arange(len(ordered))  # N, N - 1, ..., 1
    return (ordered * factors).cummax().sort_index() < level


# Picture --------------------------------------------------------------------------------
def draw(runs, groups, config):
    """Draw for each set a line of dots per group, one dot a run, and accuracies by epoch."""
    try:
        from matplotlib import colormaps, figure  # no pyplot: no display

        columns = {run["file"]: run["table"].loc[config.score]["auroc"] for run in runs}
        aurocs = pd.concat(columns, axis=1)
        sets = [name.replace("$", r"\$")[:25] for name in aurocs.index]  # no TeX
        height = 0.3 * len(sets) * max(1, len(groups) / 5)  # inches
        page = figure.Figure((7.5, height + 2.5 + 0.2 * len(groups)), dpi=130, layout="constrained")
        dots, accuracies = page.subplots(2, 1, height_ratios=(height + 0.5, 1.6))
        dots.axvline(50, color="0.8")
        for line, members in enumerate(groups.values()):
            colour = f"C{line}" if len(groups) <= 10 else colormaps["turbo"](line / len(groups))
            heights = -np.arange(len(sets)) - 0.6 * line / len(groups)
            title = members[0]["title"].replace("$", r"\$")[:100]
            for run in members:
                label = title if run is members[0] else None
                dots.plot(aurocs[run["file"]], heights, "o", color=colour, alpha=0.7, label=label)
                accuracy = 100 * pd.DataFrame(run["log"]["epochs"]).filter(like="accuracy")
                accuracies.plot(accuracy.index + 1, accuracy, color=colour, lw=1)
        dots.set_yticks(-np.arange(len(sets)), sets)
        dots.set_xlabel("AUROC of each run; grey: chance")
        accuracies.set(xlabel="epoch", ylabel="accuracy, %")
        page.legend(loc="outside lower center", frameon=False)
        page.savefig(config.picture)
        print(f"drew {config.picture}\n")
        return True
    except Exception as error:
        print(f"error: no picture: {' '.join(str(error).split())}", file=sys.stderr)
        return False


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Config)))
    except BrokenPipeError:  # compare.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
