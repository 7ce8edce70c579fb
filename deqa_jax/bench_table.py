"""What `deqa bench` measured, for a reader: a table of stages, and everything else."""

from tabulate import tabulate

from deqa_jax.bench import PHOTOGRAPH, STAGES, Row, precision


def as_table(row: Row) -> str:
    """A row for a reader: the stages, then everything else."""
    title = f"{row['model']}, batch {row['batch_size'] or '-'}, {precision(row)}"
    if row["error"]:
        return f"{title}: {row['error']}"
    seconds, flop, batch_size = row["seconds"], row["flop_per_image"], row["batch_size"]

    def line(name: str, median: float, operations: int, spread: str = "") -> tuple[str, ...]:
        achieved = operations / median
        share = f"{100 * achieved / row['matmul_flop_per_second']:.0f} %"
        return (
            name,
            _digits(1e3 * median),
            spread,
            _digits(operations / batch_size / 1e9),
            _digits(achieved / 1e12),
            share,
        )

    def measured(name: str, stage: str, operations: int) -> tuple[str, ...]:
        spread = f"{_digits(1e3 * seconds[stage]['least'])} to {_digits(1e3 * seconds[stage]['most'])}"
        return line(name, seconds[stage]["median"], operations, spread)

    everything = batch_size * sum(flop[stage] for stage in STAGES)
    lines = [
        *(measured(stage, stage, batch_size * flop[stage]) for stage in STAGES),
        line("sum of these", sum(seconds[stage]["median"] for stage in STAGES), everything),
        measured("the whole program", "whole", everything),
        # Its arithmetic is of no image.
        (*measured("prefix, once", "prefix", flop["prefix"])[:3], "", "", ""),
    ]
    headers = ("", "ms", "least to most", "GFLOP an image", "TFLOP/s", "of a matrix product")
    stages = tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * 5))
    return f"{title}: {_digits(row['images_per_second'])} images/s\n\n{stages}\n\n{_other_figures(row)}"


def _other_figures(row: Row) -> str:
    end_to_end, decoding, transfer = row["end_to_end"], row["decoding"], row["transfer_bytes_per_second"]
    width, height = PHOTOGRAPH
    counted = sum(row["flop_per_image"][stage] for stage in STAGES)
    lines = {
        f"end to end from {end_to_end['images']} JPEGs of {width}x{height}": (
            f"{_digits(end_to_end['images_per_second'])} images/s, "
            f"{100 * end_to_end['images_per_second'] / row['images_per_second']:.0f} % of the model alone"
        ),
        "reading and decoding": (
            f"{_digits(decoding['images_per_second_of_one_thread'])} images/s a thread, "
            f"{_digits(decoding['images_per_second_of_all_threads'])} of {decoding['threads']}"
        ),
        "to the devices": "-" if transfer is None else _prefixed(transfer, "B/s"),
        "tokens": " + ".join(f"{count} {name}" for name, count in row["tokens"].items()),
        "FLOP an image": (
            f"{_prefixed(counted)}; every token in every block: {_prefixed(row['flop_per_image_uncached'])}"
        ),
        "a matrix product": _prefixed(row["matmul_flop_per_second"], "FLOP/s"),
        "compiling": f"{_digits(row['compile_seconds'])} s",
        f"peak memory of the {row['peak_memory']['of']} so far": f"{row['peak_memory']['bytes'] / 2**30:.2f} GiB",
    }
    return tabulate(lines.items(), tablefmt="plain", disable_numparse=True)


def _digits(number: float) -> str:
    """Three digits, or all in front of the point.

    >>> _digits(1043.2), _digits(10.432)
    ('1043', '10.4')
    """
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _prefixed(number: float, unit: str = "") -> str:
    """A large number in three digits.

    >>> _prefixed(1.7367e12, "FLOP/s")
    '1.74 TFLOP/s'
    """
    prefix, scale = next(((p, s) for p, s in (("T", 1e12), ("G", 1e9)) if number >= s), ("M", 1e6))
    return f"{_digits(number / scale)} {prefix}{unit}"
