"""Made logs as new users bring them, and the commands of their first hour."""

import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.lib.machine import Numbers
from benchmarks.lib.processes import ROOT, TWOTOWER
from benchmarks.lib.report import Report, declared
from twotower import api
from twotower.evaluation.config import WIDTH

START, DAY = 1_750_000_000, 86_400
"""First second of the logs, and the seconds of a day."""


def main(chosen: Namespace, report: Report) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(chosen.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in chosen.only:
            log = declared(__file__)["logs"][name]
            for seed in range(1, chosen.seeds + 1):
                LOGS[name](folder / log["file"], np.random.default_rng(seed), chosen.size)
                first_hour(report, name, folder / log["file"], log["settings"], seed)


def first_hour(report: Report, name: str, path: Path, settings: list[str], seed: int) -> None:
    """Run the commands of a first hour on a log; report refusals and test metrics of model and baselines."""
    config, run, store = path.with_suffix(".toml"), path.with_suffix(".run"), path.with_suffix(".store")
    config.unlink(missing_ok=True)
    given = [[f"train.seed={seed}"]]
    done = obey(["suggest", path, "-o", config], given, [*settings])
    if done.returncode:
        raise ChildProcessError(f"suggest ended with {done.returncode}: {done.stderr}")
    call(["train", config, "--run", f"{run}{seed}"])
    trained = api.load(f"{run}{seed}", trust=True)
    call(["publish", f"{run}{seed}", "--store", f"{store}{seed}"])
    user = str(trained.dataset.users.ids[0])
    answers = call(["recommend", "--store", f"{store}{seed}", "--user", user]).stdout
    print(config.read_text(), answers, sep="\n")
    monitored = trained.config.train.monitor.removeprefix("validation.")
    for metric, value in metrics(trained.metrics, monitored).items():
        width = trained.metrics[f"test.{WIDTH}"] if metric.endswith(" model") else None
        report.add(f"{name}, seed {seed}, {metric}", value, more=True, width=width)
    report.add(f"{name}, seed {seed}, refusals", len(given) - 1, more=False)


def metrics(found: dict[str, float], monitored: str) -> Numbers:
    """Return the test values of a metric, of the model and of each baseline."""
    baselines = {k.split(".")[1]: v for k, v in found.items() if k.startswith("baseline.") and k.endswith(monitored)}
    return {f"{monitored} {who}": value for who, value in {"model": found[f"test.{monitored}"], **baselines}.items()}


def obey(words: list[object], given: list[list[str]], settings: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with settings and flags; after a refusal `given` gets a list of those of `settings` that it
    names."""
    while True:
        flags = ([setting] if setting.startswith("--") else ["--set", setting] for named in given for setting in named)
        done = call([*words, *(word for flag in flags for word in flag)], may_refuse=True)
        named = [setting for setting in settings if setting.partition("=")[0] in done.stderr]
        if done.returncode != 2 or not named:
            return done
        print(f"refused: {done.stderr}")
        settings = [setting for setting in settings if setting not in named]
        given.append(named)


def call(words: list[object], may_refuse: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command of the package and print what it prints. Raises ChildProcessError if it fails, and may not."""
    command = [*TWOTOWER, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    print(f"$ twotower {' '.join(map(str, words))}\n{done.stdout}{done.stderr}", flush=True)
    if done.returncode and not may_refuse:
        raise ChildProcessError(f"{words[0]} ended with {done.returncode}")
    return done


def shop(path: Path, draw: np.random.Generator, size: float) -> None:
    """Write sessions of views, carts and buys of liked categories; a quarter of the sessions is anonymous."""
    users, items, categories, sessions = 20_000, 6_000, 60, int(50_000 * size)
    category = draw.integers(0, categories, items)
    price = np.round(draw.lognormal(3, 1, items), 2)
    weight = (np.arange(items) + 10.0) ** -0.8
    of_category = [np.flatnonzero(category == c) for c in range(categories)]
    likes = draw.integers(0, categories, (users, 3))
    rows = []
    for session in range(sessions):
        user = int(draw.integers(0, users))
        near = of_category[int(likes[user, draw.integers(0, 3)])]
        viewed = draw.choice(
            near, min(len(near), 1 + draw.poisson(2)), replace=False, p=weight[near] / weight[near].sum()
        )
        name = None if draw.random() < 0.25 else f"u{user}"
        time = START + int(draw.integers(0, 30 * DAY))
        for item in viewed:
            bought = draw.random()
            for event in ("view", "cart", "purchase")[: 1 + (bought < 0.25) + (bought < 0.08)]:
                time += int(draw.integers(5, 90))
                rows.append(
                    (
                        time,
                        event,
                        f"p{item}",
                        int(category[item]),
                        f"brand{item % 300}",
                        float(price[item]),
                        name,
                        f"s{session}",
                    )
                )
    columns = ["event_time", "event_type", "product_id", "category_id", "brand", "price", "user_id", "user_session"]
    frame = pl.DataFrame(rows, schema=columns, orient="row").sort("event_time", maintain_order=True)
    frame.with_columns(pl.from_epoch("event_time", time_unit="s")).write_parquet(path)


def news(path: Path, draw: np.random.Generator, size: float) -> None:
    """Write reads of 80 new articles a day for 30 days, which fade in three days; readers follow two sections."""
    readers, days, sections = 8_000, 30, 10
    reads = int(120_000 * size)
    born = np.sort(draw.integers(0, days * DAY, 80 * days))
    section = draw.integers(0, sections, len(born))
    appeal = draw.lognormal(0, 1, len(born))
    follows = draw.integers(0, sections, (readers, 2))
    rows = []
    for time in np.sort(draw.integers(DAY, days * DAY, reads)):
        reader = int(draw.integers(0, readers) * draw.random())
        age = time - born
        score = appeal * np.exp(-np.maximum(age, 0) / (0.7 * DAY)) * ((age >= 0) & (age < 3 * DAY))
        score *= 0.1 + np.isin(section, follows[reader])
        rows.append((f"r{reader}", f"a{draw.choice(len(born), p=score / score.sum())}", int(START + time)))
    pl.DataFrame(rows, schema=["reader", "article", "timestamp"], orient="row").write_csv(path)


def export(path: Path, draw: np.random.Generator, size: float) -> None:
    """Write orders of 300 customers, who repeat their own forty articles, as a German program exports them."""
    customers, articles, orders = 300, 1_500, int(30_000 * size) + 3_000
    usual = [draw.choice(articles, 40, replace=False) for _ in range(customers)]
    names = ("Schraube", "Mutter", "Dübel", "Bügelsäge", "Kreuzschlüssel", "Größenmaß")
    rows = []
    for day in np.sort(draw.integers(0, 700, orders)):
        customer = int(draw.integers(0, customers))
        own = draw.random() < 0.85
        article = int(usual[customer][int(40 * draw.random() ** 2)]) if own else int(draw.integers(0, articles))
        date = np.datetime64("2024-01-02") + day
        text = f"{names[article % 6]} {article // 6}"
        amount, price = f"{draw.integers(1, 50)},0", f"{2 + article % 97},{article % 90 + 10}"
        rows.append((f"K{10_000 + customer}", f"{500_000 + article}", text, f"{date.item():%d.%m.%Y}", amount, price))
    head = "Kundennummer;Artikelnummer;Artikelbezeichnung;Bestelldatum;Menge;Preis"
    path.write_bytes("\r\n".join([head, *map(";".join, rows), ""]).encode("cp1252"))


LOGS: dict[str, Callable[[Path, np.random.Generator, float], None]] = {"shop": shop, "news": news, "export": export}
