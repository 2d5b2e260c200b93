"""Do proxies tell, without training, which networks will be good? And does evolution find a better one (EZNAS)?

Networks of three spaces are drawn, on two data sets that need no download, and each is trained by one recipe with two
seeds. How well the two seeds agree is the ceiling. Every proxy is judged by Kendall's tau with the mean accuracy, over
all networks and within tenths of equal multiplications, and by how many of the best tenth it finds. Programs evolve on
two spaces and the digits; the third space, and the signals, they have never seen. Networks that were trained are kept;
those of the default settings lie in `proxies/networks-200.json` (`--retrain` trains them anew).
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from evidence.show import quiet, table

TABLES = Path(__file__).parent / "proxies"


def main(
    quick: Annotated[bool, typer.Option(help="Five networks of each kind. Its figures mean nothing.")] = False,
    networks: Annotated[int, typer.Option(help="Of each space and data set.")] = 36,
    steps: Annotated[int, typer.Option(help="Of each training.")] = 200,
    retrain: Annotated[bool, typer.Option("--retrain", help="Do not take the accuracies that are known.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the table and of statistics.")] = Path("samples/out/12"),
) -> None:
    """Trains what is not in the table yet, judges proxies, lets programs evolve."""
    quiet()
    import torch
    from proxies import data
    from proxies.networks import SPACES, accuracy, draw

    torch.set_num_threads(1)
    networks, steps, out = (5, 10, out / "quick") if quick else (networks, steps, out)
    out.mkdir(parents=True, exist_ok=True)
    file, sets = out / f"networks-{steps}.json", {"digits": data.digits(), "signals": data.signals()}
    kept = file if file.is_file() or quick or retrain else TABLES / file.name
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else []
    known = {(row["space"], row["data"], row["number"]) for row in rows}
    for name, parts in sets.items():
        for space in SPACES:
            for number in range(networks):
                if (space, name, number) not in known:
                    blocks = draw(space, Random(f"{space} {number}"))
                    reached = [accuracy(space, blocks, parts, steps, seed) for seed in (0, 1)]
                    rows.append(
                        {"space": space, "data": name, "number": number, "blocks": blocks, "accuracies": reached}
                    )
                    file.with_suffix(".part").write_text(json.dumps(rows))
                    file.with_suffix(".part").replace(file)
    rows = [row for row in rows if row["number"] < networks]
    judge(rows, sets, out, quick)


def judge(rows: list[dict[str, Any]], sets: Any, out: Path, quick: bool) -> None:
    """Prints how the proxies rank the networks of each space and data set."""
    import numpy as np
    from proxies.networks import network
    from scipy.stats import kendalltau

    import nncf_ext
    from nncf_ext.algorithms.zero_cost.classic import CLASSIC

    kinds = list(dict.fromkeys((row["space"], row["data"]) for row in rows))
    by_kind = {kind: [row for row in rows if (row["space"], row["data"]) == kind] for kind in kinds}
    batches = {name: tuple(each[:16] for each in parts[0]) for name, parts in sets.items()}
    cache, tasks = nncf_ext.StatisticsCache(out / "statistics"), {}
    for (space, name), own in by_kind.items():
        models = [network(space, row["blocks"]) for row in own]
        files = [
            cache.add(f"{space}-{name}-{row['number']}", model, batches[name][0][:2], fresh=True)
            for row, model in zip(own, models, strict=True)
        ]
        tasks[space, name] = nncf_ext.ProxyTask(
            f"{space}, {name}", files, [float(np.mean(row["accuracies"])) for row in own]
        )
    seen = [task for (space, name), task in tasks.items() if space != "pooled" and name == "digits"]
    settings = {"generations": 2, "children": 10, "parents": 5, "deepest": 3} if quick else {}
    evolved = nncf_ext.evolve_proxy(seen, advanced_parameters=nncf_ext.AdvancedEznasParameters(**settings))
    print("Evolved on plain and residual networks for digits:")
    for each in evolved[:3]:
        print(f"  {each.program}: tau {', '.join(f'{tau:.2f}' for tau in each.taus.values())}")

    proxies = {name: name for name in [*CLASSIC, "eznas-a"]}
    if evolved:
        proxies["evolved"] = evolved[0].program
    scores: dict[str, dict[Any, Any]] = {"between seeds": {}, **{name: {} for name in proxies}}
    truth = {kind: np.array([np.mean(row["accuracies"]) for row in own]) for kind, own in by_kind.items()}
    macs = {}
    for kind, own in by_kind.items():
        images, labels = batches[kind[1]]
        models = [network(kind[0], row["blocks"]) for row in own]
        for name, text in proxies.items():
            few = 2 if name in ("eznas-a", "evolved") else len(images)  # as many as statistics were made of
            proxy = nncf_ext.Proxy(text, images[:few], labels[:few], fresh=True)
            scores[name][kind] = np.array([proxy(model) for model in models])
        macs[kind] = scores["macs"][kind]

    def tau(one: Any, other: Any) -> float:
        found = float(kendalltau(one, other).statistic) if len(one) > 1 else 0.0
        return 0.0 if np.isnan(found) else found

    lines = []
    for name, found in scores.items():
        line = [name]
        for kind, own in by_kind.items():
            if name == "between seeds":
                one, other = np.array([row["accuracies"] for row in own]).T
                line.append(f"{tau(one, other):.2f}")
                continue
            line.append(f"{tau(found[kind], truth[kind]):.2f}")
        if name != "between seeds":
            tenths, recalls = [], []
            for kind in kinds:
                order = np.array_split(np.argsort(macs[kind]), min(10, max(1, len(macs[kind]) // 4)))
                tenths += [tau(found[kind][part], truth[kind][part]) for part in order]
                best = max(1, len(truth[kind]) // 10)
                both = {*np.argsort(-found[kind])[:best]} & {*np.argsort(-truth[kind])[:best]}
                recalls.append(len(both) / best)
            line += [f"{np.mean(tenths):.2f}", f"{100 * np.mean(recalls):.0f}"]
        lines.append([*line, "", ""][: len(kinds) + 3])
    table(
        f"Kendall's tau with accuracy, {len(own)} networks a column; pooled networks and signals are held out",
        ["", *(f"{space}, {name}" for space, name in kinds), "at equal MACs", "best tenth found, %"],
        lines,
        width=180,
    )


if __name__ == "__main__":
    typer.run(main)
