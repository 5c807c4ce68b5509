"""The tables and the plot of the benchmark."""

import pathlib
import statistics

CEILING = 'ceiling: '
PRODUCTS, COPIES = f'{CEILING}products', f'{CEILING}copies'


def spread(values: list[float]) -> dict[str, float]:
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def rows(facts: dict, answers: dict, counts: dict, contestants, batch: int) -> list[dict]:
    """Returns the results of one task, one row per worker, with ratios to the first and shares of ceilings.

    All by worker name: facts, what each reported; answers, those of its turns; counts, its repetitions per
    turn; contestants, the workers that are not ceilings.
    """
    rows = []
    for name, known in facts.items():
        seconds = [answer['seconds'] / counts[name] for answer in answers[name]]
        rates = [batch / s for s in seconds]
        row = {
            'name': name,
            **known,
            'ratio': None,
            'seconds': spread(seconds),
            'rate': spread(rates),
            'rates': rates,
            'unit': 'images' if name in contestants else '',
        }
        if name in contestants and rows:
            pairs = zip(rows[0]['rates'], rates, strict=True)
            row['ratio'] = spread([ours / other for ours, other in pairs])
        if 'waiting_s' in answers[name][0]:
            waited = sum(answer['waiting_s'] for answer in answers[name])
            row['waiting'] = waited / sum(answer['seconds'] for answer in answers[name])
        for kind in ('flops', 'bytes'):
            if row.get(kind):
                row[f'{kind}_rate'] = row[kind] / row['seconds']['median']
        rows.append(row)
    for kind in ('flops', 'bytes'):
        top = ceiling(rows, kind)
        for row in rows:
            if row['unit'] and row.get(f'{kind}_rate') and top:
                row[f'{kind}_share'] = row[f'{kind}_rate'] / top
    return rows


def ceiling(rows: list[dict], kind: str) -> float | None:
    """The highest rate that a measured ceiling reached in 'flops' or 'bytes' per second, None without one."""
    rates = [row.get(f'{kind}_rate') for row in rows if row['name'].startswith(CEILING)]
    return max(filter(None, rates), default=None)


def lines(results: list[dict], classes: int) -> list[str]:
    """Returns the results of one task as a table."""
    out = [
        f'{"":<34}{"images/s":>10}{"min-max":>18}{"ratio":>8}{"min-max":>14}'
        f'{"ms":>9}{"compile":>9}{"peak":>9}{"FLOP/s":>9}{"bytes/s":>9}{"waiting":>9}'
    ]
    for row in results:
        rate, ratio = row['rate'], row['ratio']
        cells = [
            f'{row["name"]:<34}',
            f'{_rate(rate["median"]):>10}' if row['unit'] else f'{"":>10}',
            f'{_rate(rate["min"]):>9}-{_rate(rate["max"]):<8}' if row['unit'] else f'{"":>18}',
            f'{ratio["median"]:>8.2f}{ratio["min"]:>8.2f}-{ratio["max"]:<5.2f}'
            if ratio
            else f'{"":>22}',
            f'{1000 * row["seconds"]["median"]:>9,.1f}',
            f'{row["compile_s"]:>7.1f} s' if row.get('compile_s') else f'{"":>9}',
            f'{row["peak_bytes"] / 2**30:>5.1f} GiB' if row.get('peak_bytes') else f'{"":>9}',
            _share(row, 'flops'),
            _share(row, 'bytes'),
            f'{row["waiting"]:>8.1%} ' if row.get('waiting') is not None else '',
        ]
        out.append(''.join(cells).rstrip())
    for row in results:
        if 'repeats' in row:
            bits = 'the same bits' if row['repeats'] else 'different bits'
            out.append(f'{row["name"]}: repeating three steps from the same state gives {bits}')
        if 'waiting' in row and classes == 1000:
            hours = 90 * 1_281_167 / row['rate']['median'] / 3600
            out.append(
                f'{row["name"]}: 90 epochs of ImageNet (1,281,167 images) in {hours:,.1f} hours'
            )
    return out


def _rate(value: float) -> str:
    return f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'


def _share(row, kind):
    """Formats the share of a measured ceiling; for the ceiling itself, its rate in 1e9 per second."""
    if not row.get(f'{kind}_rate'):
        return f'{"":>9}'
    if row.get(f'{kind}_share') is None:
        return f'{row[f"{kind}_rate"] / 1e9:>8,.0f}G'
    return f'{row[f"{kind}_share"]:>9.0%}'


def layer_lines(rows: list[dict], batch: int, ceiling: float, step_s: float) -> list[str]:
    """Returns a table of operations, each timed alone, and of the whole step."""
    out = [
        f'{"each alone, batch " + str(batch):<24}{"calls":>6}{"GFLOP":>9}{"forward ms":>12}'
        f'{"backward ms":>13}{"share of the ceiling":>22}'
    ]
    for row in rows:
        seconds = row['forward_s'] + row['backward_s']
        share = (
            f'{row["products"] * row["flops"] / seconds / ceiling:>22.0%}' if row['flops'] else ''
        )
        gflop = f'{row["flops"] / 1e9:>9.2f}' if row['flops'] else f'{"":>9}'
        out.append(
            f'{row["name"]:<24}{row["calls"]:>6}{gflop}{1000 * row["forward_s"]:>12.1f}'
            f'{1000 * row["backward_s"]:>13.1f}{share}'
        )
    total = [sum(row[kind] for row in rows) for kind in ('forward_s', 'backward_s')]
    out.append(f'{"sum":<39}{1000 * total[0]:>12.1f}{1000 * total[1]:>13.1f}')
    out.append(f'{"the whole step":<39}{1000 * step_s:>25.1f}')
    return out


def draw(tasks: dict[str, list[dict]], title: str, out: pathlib.Path) -> None:
    """Draws one panel per task: a mark for every round, a bar for the median."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    tasks = {task: [row for row in rows if row['unit']] for task, rows in tasks.items()}
    heights = [len(rows) + 1 for rows in tasks.values()]
    figure, panels = plt.subplots(
        len(tasks),
        1,
        figsize=(9, 0.42 * sum(heights) + 1),
        layout='constrained',
        gridspec_kw={'height_ratios': heights},
        squeeze=False,
    )
    figure.suptitle(title, fontsize=10)
    for axes, (task, rows) in zip(panels[:, 0], tasks.items(), strict=True):
        for i, row in enumerate(rows):
            ours = row['ratio'] is None
            axes.barh(i, row['rate']['median'], color='#0072b2' if ours else '#bbbbbb', height=0.7)
            axes.plot(row['rates'], [i] * len(row['rates']), 'k|', markersize=7, alpha=0.6)
            axes.text(
                0,
                i,
                f' {_rate(row["rate"]["median"])}',
                va='center',
                fontsize=8,
                color='white' if ours else 'black',
            )
        axes.set_yticks(range(len(rows)), [row['name'] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(task, fontsize=9, loc='left')
        axes.set_xlabel('images/s', fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)
